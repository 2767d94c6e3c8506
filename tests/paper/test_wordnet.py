"""Glosses of WordNet: from a small file to tokens and labels, and what is said of lines that are none of a gloss."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.paper import losses
from benchmarks.paper.data import Data, DataError, Options, open_data
from benchmarks.paper.data.wordnet import LENGTH, LEXICOGRAPHER_FILES, PARTS, TASKS, WORDS, plain

ROWS = [(f"a thing of kind {i // 2}, number {i}", "nvar"[i % 4], f"{i % 45:02d}", str(i % 7 - 1)) for i in range(200)]


def write(path: Path, rows) -> Path:
    path.write_text("".join("\t".join(row) + "\n" for row in rows))
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "wordnet.tsv", ROWS)


def opened(root: Path, **options) -> Data:
    return open_data("wordnet", Options(root=root, **options))


def texts(items) -> list[str]:
    return [gloss.text for gloss in items.glosses]


def test_items_are_the_lines(file: Path) -> None:
    data = opened(file)
    assert data.names == ["part_of_speech", "lexicographer", "depth"] and data.size is None
    assert len(LEXICOGRAPHER_FILES) == 45 and data.tasks["lexicographer"].channels == 45
    by_text = {row[0]: row[1:] for row in ROWS}
    assert sorted(texts(data.train) + texts(data.val)) == sorted(by_text)
    for items in (data.train, data.val):
        for index, text in enumerate(texts(items)):
            inputs, labels = items[index, None]
            part, number, depth = by_text[text]
            assert inputs.keys() == {"input_ids", "attention_mask"}
            assert all(value.shape == (LENGTH,) and value.dtype == torch.int64 for value in inputs.values())
            assert inputs["input_ids"].max() < data.vocabulary == WORDS
            assert labels["part_of_speech"].item() == list(PARTS).index(part)
            assert labels["lexicographer"].item() == int(number) and labels["lexicographer"].dtype == torch.int64
            assert labels["depth"].dtype == torch.float32 and labels["depth"].shape == (1,)
            (got,) = labels["depth"].tolist()
            assert math.isnan(got) if depth == "-1" else got == int(depth)


def test_the_folder_is_a_root_too(file: Path) -> None:
    assert texts(opened(file.parent).train) == texts(opened(file).train)


def test_equal_glosses_are_in_one_split_and_the_order_of_lines_does_not_matter(tmp_path: Path) -> None:
    twice = [*ROWS, *((text.upper(), "v", "30", "-1") for text, *_ in ROWS[::-1])]
    data = opened(write(tmp_path / "twice.tsv", twice))
    sets = [{text.lower() for text in texts(items)} for items in (data.train, data.val)]
    assert not sets[0] & sets[1] and len(sets[0] | sets[1]) == len(ROWS)
    assert len(data.train) == 2 * len(sets[0]) and len(data.val) == 2 * len(sets[1])
    assert 8 <= len(sets[1]) <= 35  # one in ten
    one, other = (opened(write(tmp_path / "a.tsv", rows)) for rows in (ROWS, ROWS[::-1]))
    assert texts(one.train) == texts(other.train) and texts(one.val) == texts(other.val)


def test_the_first_few_are_a_sample_of_all(file: Path) -> None:
    data, some = opened(file), opened(file, train=30, val=3)
    assert texts(some.train) == texts(data.train)[:30] and texts(some.val) == texts(data.val)[:3]
    numbers = [int(text.split()[-1]) for text in texts(some.train)]
    assert min(numbers) < 60 and max(numbers) > 140  # not the file's first ones
    assert texts(opened(file, seed=1).val) != texts(data.val)


def test_plain_tokens_are_words_whatever_the_process() -> None:
    tokens = plain("The cat, the CAT!")
    ids = tokens["input_ids"].tolist()
    start, the, cat, comma, again, same, mark = ids[:7]
    assert (the, cat) == (again, same) and len({start, the, cat, comma, mark}) == 5 and ids[7:] == [0] * 25
    assert tokens["attention_mask"].tolist() == [1] * 7 + [0] * 25 and 0 not in ids[:7]
    long = plain("word " * 100)
    assert long["attention_mask"].sum() == LENGTH and long["input_ids"][0] == start
    assert plain("été\u2003naïve")["attention_mask"].sum() == 3
    code = f"""
import sys; sys.path[:0] = {sys.path!r}
from benchmarks.paper.data.wordnet import plain
print(plain("The cat, the CAT!")["input_ids"].tolist())
"""
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert other.strip() == str(ids)


def test_a_tokenizer_of_transformers(file: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "thing", "of", "kind", ",", "number"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    folder = tmp_path / "tokenizer"
    transformers.BertTokenizer(str(tmp_path / "vocab.txt"), padding_side="left").save_pretrained(folder)
    data = opened(file, tokenizer=str(folder))
    inputs, _ = data.train[0, None]
    known = [words[token] for token in inputs["input_ids"].tolist()]
    assert known[:5] == ["[CLS]", "a", "thing", "of", "kind"] and known[-1] == "[PAD]" and data.vocabulary == len(words)
    assert all(value.shape == (LENGTH,) and value.dtype == torch.int64 for value in inputs.values())
    assert inputs["attention_mask"].sum() == known.index("[SEP]") + 1
    with pytest.raises(ValueError, match=f"tokenizer {tmp_path}/none cannot be loaded"):
        opened(file, tokenizer=f"{tmp_path}/none")


def test_losses_and_metrics_take_the_labels(file: Path) -> None:
    data = opened(file)
    labels = {task: torch.stack([data.train[i, None][1][task] for i in range(40)]) for task in TASKS}
    assert labels["depth"].isnan().any()
    for name, task in data.tasks.items():
        if task.classes:
            right = 50 * torch.nn.functional.one_hot(labels[name], task.channels).float()
        else:
            right = labels[name].nan_to_num(99)
        right.requires_grad_()
        loss, meter = task.loss(right, labels[name]), task.meter()
        meter.update(right.detach(), labels[name])
        loss.backward()
        assert loss.item() == pytest.approx(0, abs=1e-6) and right.grad.isfinite().all(), name
        assert meter.compute() == pytest.approx(0 if task.lower_is_better else 100), name
    nothing = torch.full((4, 1), math.nan)
    output = torch.ones(4, 1, requires_grad=True)
    loss = losses.l1_loss(output, nothing)
    loss.backward()
    assert loss.item() == 0 and output.grad.tolist() == [[0.0]] * 4
    assert losses.l1_loss(output, torch.tensor([[3.0], [math.nan], [2.0], [1.0]])).item() == pytest.approx(1)


# ---- the file


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("a cat\tn\t05", "line 3: has 3 columns, not the 4"),
        ("a cat\tn\t05\t3\tx", "line 3: has 5 columns"),
        ("", "line 3: has 1 columns"),
        (" \tn\t05\t3", "line 3: the gloss is empty"),
        ("a cat\ts\t05\t3", "line 3: the part of speech is 's', not one of n, v, a, r"),
        ("a cat\tn\t45\t3", "line 3: the lexicographer file is '45', not one of 00 to 44"),
        ("a cat\tn\t5\t3", "line 3: the lexicographer file is '5'"),
        ("a cat\tn\t05\t-2", "line 3: the depth is '-2'"),
        ("a cat\tn\t05\tdeep", "line 3: the depth is 'deep'"),
        ("a cat\tn\t05\t3.5", "line 3: the depth is '3.5'"),
    ],
)
def test_lines_that_are_no_gloss_are_named(file: Path, line: str, says: str) -> None:
    lines = file.read_text().split("\n")
    file.write_text("\n".join([*lines[:2], line, *lines[2:]]))
    with pytest.raises(DataError, match=rf"wordnet\.tsv, {says}"):
        opened(file)


def test_what_is_no_text_is_named(file: Path) -> None:
    file.write_bytes(b"a cat\tn\t05\t3\n\xff\xfe cat\tn\t05\t3\n")
    with pytest.raises(DataError, match=r"wordnet\.tsv, line 2: 'utf-8' codec can't decode"):
        opened(file)


def test_ends_of_lines_do_not_matter(file: Path) -> None:
    want = texts(opened(file).train)
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n")[:-2])
    assert texts(opened(file).train) == want


def test_missing_and_empty_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"wordnet\.tsv cannot be read: No such file"):
        opened(tmp_path)
    with pytest.raises(DataError, match=r"other\.tsv cannot be read: No such file"):
        opened(tmp_path / "other.tsv")
    (tmp_path / "wordnet.tsv").touch()
    with pytest.raises(DataError, match=r"wordnet\.tsv: the split 'train' is empty, of 0 glosses"):
        opened(tmp_path)
    write(tmp_path / "wordnet.tsv", ROWS[:1])
    with pytest.raises(DataError, match=r"the split '(train|val)' is empty, of 1 glosses"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tasks": ("gender",)}, "tasks must be among part_of_speech, lexicographer, depth, got 'gender'"),
        ({"size": (40, 40)}, "size means nothing to the data set 'wordnet'"),
        ({"val": 0}, "val must be at least 1, got 0"),
    ],
)
def test_bad_options_name_the_culprit(file: Path, options: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        opened(file, **options)


def test_a_root_is_needed_and_items_are_counted(file: Path) -> None:
    with pytest.raises(ValueError, match="'wordnet' needs its root"):
        open_data("wordnet", Options())
    with pytest.raises(IndexError, match=rf"index must be in \[0, 5\), got {5}"):
        opened(file, train=5).train[5, None]
