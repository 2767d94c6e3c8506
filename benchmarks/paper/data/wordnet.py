"""Glosses of WordNet: texts of a few words, with a part of speech, a lexicographer file and a depth.

The root is a text file, or the folder of ``wordnet.tsv``. A line is a gloss, its part of speech (n, v, a, r), its
lexicographer file (00 to 44) and its depth below the root of the hierarchy (-1: none), with tabs between them.
"""

import codecs
import hashlib
import os
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...clients import import_torchvision
from .. import losses, metrics
from ..tasks import Task, choose
from .common import check_counts, classification, index_of, refuse
from .dataset import Data, DataError, Item, Options

PARTS = {"n": "noun", "v": "verb", "a": "adjective", "r": "adverb"}
LEXICOGRAPHER_FILES = (
    "adj.all", "adj.pert", "adv.all", "noun.Tops", "noun.act", "noun.animal", "noun.artifact", "noun.attribute",
    "noun.body", "noun.cognition", "noun.communication", "noun.event", "noun.feeling", "noun.food", "noun.group",
    "noun.location", "noun.motive", "noun.object", "noun.person", "noun.phenomenon", "noun.plant", "noun.possession",
    "noun.process", "noun.quantity", "noun.relation", "noun.shape", "noun.state", "noun.substance", "noun.time",
    "verb.body", "verb.change", "verb.cognition", "verb.communication", "verb.competition", "verb.consumption",
    "verb.contact", "verb.creation", "verb.emotion", "verb.motion", "verb.perception", "verb.possession", "verb.social",
    "verb.stative", "verb.weather", "adj.ppl",
)  # fmt: skip
LENGTH = 32
"""Tokens of a text: longer ones are cut, shorter ones filled up."""
WORDS = 8192
"""Tokens that the plain tokenizer knows."""
VAL = 10
"""One gloss in so many is for validation."""

TASKS = {
    "part_of_speech": classification(tuple(PARTS.values())),
    "lexicographer": classification(LEXICOGRAPHER_FILES),
    "depth": Task(1, losses.l1_loss, lambda: metrics.L1Error(), "L1", "levels", lower_is_better=True, is_dense=False),
}
Tokenize = Callable[[str], dict[str, Tensor]]
"""A text -> {"input_ids", "attention_mask"}, each (LENGTH,) int64."""


class Gloss(NamedTuple):
    text: str
    part_of_speech: int
    lexicographer: int
    depth: float
    """NaN where there is none."""


def open_data(options: Options) -> Data:
    """The glosses, one in ten for validation; equal glosses are in one split. Another seed is another division.

    An item is ``{"input_ids", "attention_mask"}``, each (32,) int64, and labels: classes (), int64; depth (1,) float32,
    NaN where there is none. Nothing is drawn for an item.

    Raises:
        ValueError: no root, an unknown task, less than 1 item, a tokenizer that cannot fill up texts, or an option that
            means nothing.
        DataError: the file is missing or damaged, or a split is empty; the message names the file and the line.
    """
    refuse(options, "wordnet", "size")
    check_counts(options)
    tasks = choose(TASKS, options.tasks)
    if options.root is None:
        raise ValueError("the data set 'wordnet' needs its root, a file or the folder of wordnet.tsv")
    path = Path(options.root)
    path = path / "wordnet.tsv" if os.path.isdir(path) else path
    tokenize, vocabulary = (plain, WORDS) if options.tokenizer is None else pretrained(options.tokenizer)
    splits: dict[str, list[tuple[int, int, Gloss]]] = {"train": [], "val": []}
    for line, gloss in enumerate(read_glosses(path)):
        key = f"{options.seed}/{' '.join(gloss.text.lower().split())}"
        number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
        splits["train" if number % VAL else "val"].append((number // VAL, line, gloss))
    for split, rows in splits.items():
        if not rows:
            raise DataError(f"{path}: the split {split!r} is empty, of {sum(map(len, splits.values()))} glosses")
        rows.sort()  # not in the file's order, so that the first few of them are a sample of all
    train, val = (
        Texts([gloss for *_, gloss in rows[: getattr(options, split)]], tokenize, tuple(tasks))
        for split, rows in splits.items()
    )
    return Data("wordnet", tasks, train, val, None, vocabulary)


class Texts:
    """A split; see ``Items``.

    Raises:
        IndexError: no such text.
    """

    def __init__(self, glosses: list[Gloss], tokenize: Tokenize, tasks: tuple[str, ...]) -> None:
        self.glosses, self.tokenize, self.tasks = glosses, tokenize, tasks

    def __len__(self) -> int:
        return len(self.glosses)

    def __getitem__(self, key: tuple[int, int | None]) -> Item:
        index = index_of(key, len(self))
        gloss = self.glosses[index]
        labels = {
            "part_of_speech": torch.tensor(gloss.part_of_speech),
            "lexicographer": torch.tensor(gloss.lexicographer),
            "depth": torch.tensor([gloss.depth], dtype=torch.float32),
        }
        return self.tokenize(gloss.text), {task: labels[task] for task in self.tasks}


# --- the file ---------------------------------------------------------------------------------------------------------


def read_glosses(path: Path) -> list[Gloss]:
    """Every line of the file.

    Raises:
        DataError: there is no such file, or a line is none of a gloss.
    """
    try:
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    if not lines[-1]:
        lines.pop()  # after the last line's end
    return [_gloss(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def _gloss(line: bytes, where: str) -> Gloss:
    try:
        columns = line.decode().rstrip("\r").split("\t")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: {error}") from error
    if len(columns) != 4:
        raise DataError(f"{where}: has {len(columns)} columns, not the 4 of gloss, part of speech, file and depth")
    text, part, file, depth = columns
    if not text.strip():
        raise DataError(f"{where}: the gloss is empty")
    if part not in PARTS:
        raise DataError(f"{where}: the part of speech is {part!r}, not one of {', '.join(PARTS)}")
    if not re.fullmatch("[0-9][0-9]", file) or int(file) >= len(LEXICOGRAPHER_FILES):
        raise DataError(f"{where}: the lexicographer file is {file!r}, not one of 00 to {len(LEXICOGRAPHER_FILES) - 1}")
    if not re.fullmatch("-1|[0-9]{1,3}", depth):
        raise DataError(f"{where}: the depth is {depth!r}, neither a number of levels nor -1")
    levels = float(depth) if depth != "-1" else float("nan")
    return Gloss(text, list(PARTS).index(part), int(file), levels)


# --- tokens -----------------------------------------------------------------------------------------------------------


def plain(text: str) -> dict[str, Tensor]:
    """Words by their sums of bytes: 0 fills up, 1 stands before every text, and a word has one of the others, the same
    in every process; two words may share one."""
    words = re.findall(r"\w+|[^\w\s]", text.lower())[: LENGTH - 1]
    tokens = [1, *(2 + zlib.crc32(word.encode()) % (WORDS - 2) for word in words)]
    mask = torch.zeros(LENGTH, dtype=torch.int64)
    mask[: len(tokens)] = 1
    return {"input_ids": torch.tensor(tokens + [0] * (LENGTH - len(tokens))), "attention_mask": mask}


class _Pretrained:
    """A tokenizer of transformers."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, text: str) -> dict[str, Tensor]:
        tokens = self.tokenizer(text, padding="max_length", truncation=True, max_length=LENGTH)
        return {name: torch.tensor(tokens[name]) for name in ("input_ids", "attention_mask")}


def pretrained(name: str) -> tuple[Tokenize, int]:
    """The tokenizer of a folder or name that transformers knows, and how many tokens it has."""
    import_torchvision()
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer {name} cannot be loaded: {error}") from error
    if tokenizer.pad_token is None:
        raise ValueError(f"tokenizer {name} has no token that fills up texts of different lengths")
    tokenizer.padding_side = tokenizer.truncation_side = "right"  # the first token stands for the text
    return _Pretrained(tokenizer), len(tokenizer)
