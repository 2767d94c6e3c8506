"""What the loaders of the public data sets have in common, on trees in their layouts: the same items whoever reads
them, roots that nothing is written to, and errors that name the file."""

import os
import pickle
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from benchmarks.paper import metrics
from benchmarks.paper.data import DataError, Options, nyud, open_data, pascal, taskonomy, trees
from benchmarks.rooms.scenes import render

NAMES = ("nyud", "pascal", "taskonomy")
TABLES = {"nyud": nyud.TASKS, "pascal": pascal.TASKS, "taskonomy": taskonomy.TASKS}
COUNT = 4
SPLIT_FILE = {"nyud": nyud.Nyud.splits["train"], "pascal": pascal.Pascal.splits["train"], "taskonomy": taskonomy.SPLITS}
PHOTOGRAPHS = {"nyud": "images", "pascal": "JPEGImages", "taskonomy": "rgb/taskonomy/train"}
FILES = {  # one of every kind
    "nyud": ("images/*.png", "segmentation/*.png", "depth/*.npy", "normals/*.png", "edge/*.png"),
    "pascal": (
        "JPEGImages/*.jpg",
        "semseg/VOC12/*.png",
        "human_parts/*0000.mat",
        "human_parts/*0001.mat",
        "pascal-context/trainval/*.mat",
        "sal_distill/*.png",
    ),
    "taskonomy": ("rgb/taskonomy/train/*.png", "depth_zbuffer/taskonomy/train/*.png", "normal/taskonomy/train/*.png"),
}


FOLDERS = {
    "nyud": [*nyud.Nyud.folders],
    "pascal": [*pascal.Pascal.folders, "semseg/pascal-context"],
    "taskonomy": ["rgb", *taskonomy.STORED],
}


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """{data set: root}; not to be changed."""
    base = tmp_path_factory.mktemp("trees")
    for name in NAMES:
        trees.write_tree(name, base / name, COUNT)
    return {name: base / name for name in NAMES}


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def root(roots, name):
    return roots[name]


@pytest.fixture
def copy(root, tmp_path):
    """A root to break."""
    return shutil.copytree(root, tmp_path / "copy")


def opened(name, root, **options):
    return open_data(name, Options(root=root, size=trees.SIZE, **options))


def same(a, b):
    (x, labels), (y, others) = a, b
    return (
        torch.equal(x, y)
        and labels.keys() == others.keys()
        and all(torch.equal(labels[task].nan_to_num(-9), others[task].nan_to_num(-9)) for task in labels)
    )


def snapshot(root):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in [root, *root.rglob("*")]}


def test_tasks_losses_and_items_fit(name, root):
    data = opened(name, root)
    assert list(data.tasks) == list(TABLES[name]) and data.size == trees.SIZE and data.name == name
    assert len(data.train) == len(data.val) == COUNT
    images, labels = next(iter(DataLoader(data.train, batch_size=COUNT, sampler=[(i, 5) for i in range(COUNT)])))
    assert images.shape == (COUNT, 3, *trees.SIZE) and images.dtype == torch.float32 and images.isfinite().all()
    assert list(labels) == list(data.tasks)
    for task, table in data.tasks.items():
        shape = (COUNT, *trees.SIZE) if table.classes else (COUNT, table.channels, *trees.SIZE)
        assert labels[task].shape == shape
        assert labels[task].dtype == (torch.int64 if table.classes else torch.float32)
        prediction = torch.randn(COUNT, table.channels, *trees.SIZE, requires_grad=True)
        loss = table.loss(prediction, labels[task])
        loss.backward()
        assert 0 < loss.item() < 10 and prediction.grad.abs().max() > 0
        if table.classes:
            assert len(table.classes) == table.channels
            assert set(labels[task].unique().tolist()) <= {*range(table.channels), 255}


@pytest.mark.skipif(not hasattr(metrics, "L1Error"), reason="the meters of these data sets are not there")
def test_meters_tell_a_perfect_prediction(name, root):
    data = opened(name, root)
    _, labels = next(iter(DataLoader(data.val, sampler=[(0, None)])))
    for task, table in data.tasks.items():
        label = labels[task]
        perfect = label.nan_to_num()
        if table.classes:
            perfect = (
                20 * torch.nn.functional.one_hot(label.where(label != 255, 0), table.channels).movedim(-1, 1).float()
            )
        elif task == "edge":
            perfect = torch.where(label == 1, 9.0, -9.0)
        scores = []
        for prediction in (perfect, torch.randn(perfect.shape, generator=torch.Generator().manual_seed(0))):
            meter = table.meter()
            meter.update(prediction, label)
            scores.append(meter.compute())
        assert (scores[0] < scores[1]) == table.lower_is_better, task


def test_workers_and_order_change_nothing(name, root):
    train = opened(name, root).train
    keys = [(index, draw) for draw in (0, 1, None) for index in range(COUNT)]
    alone = {key: train[key] for key in reversed(keys)}
    for workers in (0, 1, 2):
        loader = DataLoader(train, batch_size=None, sampler=keys, num_workers=workers)
        assert all(same(item, alone[key]) for key, item in zip(keys, loader, strict=True))
    again = opened(name, root).train
    assert all(same(again[key], alone[key]) for key in keys)


def test_draws_differ_and_evaluation_draws_nothing(name, root):
    data = opened(name, root)
    drawn = [data.train[1, draw] for draw in range(6)]
    assert not all(same(drawn[0], item) for item in drawn[1:])
    state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    assert same(data.train[1, None], data.train[1, None])
    data.train[1, 3]
    assert torch.equal(torch.get_rng_state(), state[0]) and np.random.get_state()[1].tolist() == state[1]
    for index in (-1, COUNT):
        with pytest.raises(IndexError, match=rf"index must be in \[0, {COUNT}\), got {index}"):
            data.train[index, None]


def test_an_image_does_not_depend_on_the_tasks(name, root):
    """Arms that train one task see what those see that train all."""
    everything = opened(name, root).train
    for task in TABLES[name]:
        alone = opened(name, root, tasks=(task,))
        assert list(alone.tasks) == [task]
        image, labels = alone.train[2, 4]
        expected, others = everything[2, 4]
        assert torch.equal(image, expected) and list(labels) == [task]
        assert torch.equal(labels[task].nan_to_num(-9), others[task].nan_to_num(-9))


def test_nothing_is_written_and_a_read_only_root_will_do(name, copy):
    for path in [*copy.rglob("*"), copy]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = snapshot(copy)
    data = opened(name, copy)
    for index in range(COUNT):
        data.train[index, 0], data.val[index, None]
    assert snapshot(copy) == before
    for path in [copy, *copy.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)


def test_links_lead_to_the_same_items(name, root, copy, tmp_path):
    os.symlink(root, tmp_path / "link")
    elsewhere = tmp_path / "elsewhere"
    linked = next((copy / PHOTOGRAPHS[name]).iterdir())
    shutil.move(linked, elsewhere)
    linked.symlink_to(elsewhere)
    expected = opened(name, root)
    for place in (tmp_path / "link", copy):
        data = opened(name, place)
        assert all(same(data.train[i, 1], expected.train[i, 1]) for i in range(COUNT))
    elsewhere.unlink()  # a link that leads nowhere is no file
    with pytest.raises(DataError, match=rf"lacks 1 of the \d+ files .*{linked.name}"):
        opened(name, copy)


def test_a_split_can_be_sent_to_another_process(name, root):
    """As loaders do whose workers are started afresh; nothing that was read goes with it."""
    train = opened(name, root).train
    before = pickle.dumps(train)
    expected = train[1, 0]
    assert len(pickle.dumps(train)) == len(before) < 10_000
    assert same(pickle.loads(before)[1, 0], expected)


def test_folders_are_listed_once_however_many_files_they_hold(name, tmp_path, monkeypatch):
    counts = []
    for count in (1, 5):
        trees.write_tree(name, tmp_path / str(count), count)
        calls = Counter()

        def counting(function, calls=calls):
            def call(*args, **kwargs):
                calls[function.__name__] += 1
                return function(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for function in (os.scandir, os.stat):
                patch.setattr(os, function.__name__, counting(function))
            open_data(name, Options(root=tmp_path / str(count), size=None if name != "taskonomy" else trees.SIZE))
        counts.append(calls)
    assert counts[0] == counts[1] and 0 < counts[0]["scandir"] <= 2 * len(FOLDERS[name])


def test_limits_take_the_first(name, root):
    data, few = opened(name, root), opened(name, root, train=2, val=1)
    assert (len(few.train), len(few.val)) == (2, 1)
    assert same(few.train[1, 0], data.train[1, 0]) and same(few.val[0, None], data.val[0, None])
    assert len(opened(name, root, train=99).train) == COUNT


def test_limits_do_without_the_rest(name, copy):
    for path in (copy / PHOTOGRAPHS[name]).iterdir():
        if not any(mark in path.name for mark in ("0000", "0001", "point_0", "point_1_")):
            path.unlink()
    assert len(opened(name, copy, train=2, val=2).train) == 2
    with pytest.raises(DataError, match="lacks"):
        opened(name, copy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"root": None}, "needs the root of its files, got none"),
        ({"tokenizer": "words"}, "tokenizer means nothing"),
        ({"seed": 1}, "seed means nothing"),
        ({"train": 0}, "train must be at least 1, got 0"),
        ({"val": -2}, "val must be at least 1, got -2"),
        ({"size": (64, 0)}, "size must be"),
        ({"tasks": ("semseg", "colour")}, "tasks must be among .* got .*'colour'"),
        ({"tasks": ()}, "tasks must be among .* got none"),
    ],
)
def test_options_out_of_range(name, root, options, message):
    with pytest.raises(ValueError, match=message):
        open_data(name, Options(**{"root": root, "size": trees.SIZE} | options))


def test_no_root(name, tmp_path):
    with pytest.raises(DataError, match=rf"{tmp_path / 'absent'} is no folder"):
        opened(name, tmp_path / "absent")


def test_another_layout_says_what_was_sought_and_what_is_there(name, copy, tmp_path):
    (copy / SPLIT_FILE[name]).unlink()
    (copy / "0strange").mkdir()
    with pytest.raises(DataError) as caught:
        opened(name, copy)
    assert f"lacks {SPLIT_FILE[name]} of " in str(caught.value) and "and holds " in str(caught.value)
    assert "0strange/" in str(caught.value)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match="holds nothing"):
        opened(name, empty)


def test_a_root_one_level_too_high(name, root, tmp_path):
    folder = {"nyud": "NYUDv2", "pascal": "PASCALContext", "taskonomy": "taskonomy"}[name]
    os.symlink(root, tmp_path / folder)
    with pytest.raises(DataError, match=rf"They lie in {tmp_path / folder}: name that folder"):
        opened(name, tmp_path)


def test_all_missing_files_at_once(name, copy):
    gone = [path for pattern in FILES[name] for path in list(copy.glob(pattern))[:3]]
    for path in gone:
        path.unlink()
    with pytest.raises(DataError) as caught:
        opened(name, copy)
    message = str(caught.value)
    assert f"lacks {len(gone)} of the " in message
    listed = [path for path in gone if path.name in message and path.relative_to(copy).parts[0] in message]
    assert len(listed) == len(gone) if len(gone) <= 10 else f"… ({len(gone)} in all)" in message


def test_a_truncated_file_is_named_or_was_whole(name, copy):
    """Cut anywhere, a file is refused by its name, or what was cut off did not matter."""
    data = opened(name, copy).train
    expected = [data[index, None] for index in range(2)]
    for pattern in FILES[name]:
        path = next(path for path in sorted(copy.glob(pattern)) if "val" not in path.name)
        index = int(path.stem[-1]) if name != "taskonomy" else 0
        content = path.read_bytes()
        for keep in [0, 1, *(len(content) * np.arange(1, 8) // 8).tolist(), len(content) - 1]:
            path.write_bytes(content[:keep])
            try:
                item = data[index, None]
            except DataError as error:
                assert str(path) in str(error)
            else:
                assert same(item, expected[index]), (path, keep, len(content))
        path.write_bytes(content)


def test_what_is_no_picture_is_named_by_workers_too(name, copy):
    data = opened(name, copy).train
    path = min((copy / PHOTOGRAPHS[name]).iterdir())
    path.write_text("<html>not found</html>")
    loader = DataLoader(data, sampler=[(i, 0) for i in range(COUNT)], num_workers=1)
    with pytest.raises(DataError, match=f"{path.name} cannot be read as a picture"):
        list(loader)


def test_the_same_tree_again_and_another(name, root, tmp_path):
    trees.write_tree(name, tmp_path / "again", COUNT)
    trees.write_tree(name, tmp_path / "other", COUNT, seed=1)
    files = sorted(path.relative_to(root) for path in root.rglob("*.png"))
    assert files and files == sorted(
        path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*.png")
    )
    for file in files:
        assert (root / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    assert any((root / file).read_bytes() != (tmp_path / "other" / file).read_bytes() for file in files)


def test_trees_show_what_was_rendered(name, root):
    _, labels = render(range(COUNT), trees._TREES[name][0], 0, "val")
    depth = {"nyud": "depth", "taskonomy": "DZ"}.get(name)
    val = opened(name, root).val
    image, out = val[1, None]
    if depth == "depth":
        known = out["depth"] > 0
        assert known.any() and set(out["depth"][known].tolist()) <= set(labels["depth"][1].flatten().tolist())
    elif depth == "DZ":
        metres = (out["DZ"] * np.log(2**16)).expm1() / 512
        mean = torch.nn.functional.avg_pool2d(labels["depth"][1], 2)
        known = metres.isfinite()
        assert known.any() and (metres - mean)[known].abs().max() < 0.01
    else:
        assert (out["saliency"] == 1).sum() == labels["saliency"][1][:, : 96 - 4].sum()
    assert image.std() > 0.1


def test_bad_arguments_of_trees(tmp_path):
    with pytest.raises(ValueError, match="name must be one of nyud, pascal, taskonomy, got 'cityscapes'"):
        trees.write_tree("cityscapes", tmp_path, 1)
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        trees.write_tree("nyud", tmp_path, 0)
    assert not list(tmp_path.iterdir())
