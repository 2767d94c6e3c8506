"""Files of a data set: folders are listed once, what is missing is named all at once, and a file that cannot be read
is named when it is read. Nothing here writes."""

import csv
import io
import os
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .common import check_counts, check_size, refuse
from .dataset import DataError, Options

NAMED = 10
"""So many of a long list are named in a message."""
_CHANNELS = {
    "rgb": ("RGB", "RGBA", "L", "P", "CMYK", "YCbCr"),
    "vector": ("RGB", "RGBA"),
    "classes": ("L", "P"),
    "grey": ("L", "1"),
    "grey 16": ("I;16", "I;16B", "I;16L", "I"),
}
"""What a picture is read for, and Pillow's modes of files that hold it: see ``read_picture``."""


def named(items: Iterable[object]) -> str:
    """The first ten of a list, and how many there are if there are more."""
    items = list(items)
    text = ", ".join(map(str, items[:NAMED]))
    return text if len(items) <= NAMED else f"{text} … ({len(items)} in all)"


def pixels(sides: Sequence[int]) -> str:
    """Height and width, as they are printed."""
    return f"{sides[0]} × {sides[1]}"


def check_same_size(path: Path, sides: Sequence[int], image: Path, image_sides: Sequence[int]) -> None:
    """Refuse a label that is not as large as its image, by (height, width) of both."""
    if tuple(sides) != tuple(image_sides):
        raise DataError(f"{path} is {pixels(sides)}, but its image {image} is {pixels(image_sides)}")


class Listing:
    """Which files lie under a root: ``"images/1.png" in listing``. A folder is listed once, when it is first asked for.

    A link counts if it leads to a file.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._folders: dict[str, frozenset[str]] = {}

    def __contains__(self, path: str) -> bool:
        folder, _, name = path.rpartition("/")
        return name in self.names(folder)

    def names(self, folder: str) -> frozenset[str]:
        """Names of the files in a folder of the root; none where there is no such folder."""
        if folder not in self._folders:
            try:
                with os.scandir(self._root / folder) as entries:
                    names = frozenset(entry.name for entry in entries if entry.is_file())
            except (FileNotFoundError, NotADirectoryError):
                names = frozenset()
            except OSError as error:
                raise DataError(f"{self._root / folder} cannot be listed: {error}") from error
            self._folders[folder] = names
        return self._folders[folder]


def check_options(options: Options, title: str, default: tuple[int, int]) -> tuple[Path, tuple[int, int]]:
    """The root and the size of the images, (height, width), of a data set of files.

    Raises:
        ValueError: an option is missing, means nothing here or is out of its range.
        DataError: the root is no folder.
    """
    if options.root is None:
        raise ValueError(f"{title} needs the root of its files, got none")
    refuse(options, title, "tokenizer")
    if options.seed != 0:
        raise ValueError(f"seed means nothing to {title}, which is read and not drawn: leave it 0, got {options.seed}")
    check_counts(options)
    size = check_size(options, default, 1)
    root = Path(options.root)
    if not os.path.isdir(root):  # unlike that of Path, this says no wherever a look fails
        raise DataError(f"{root} is no folder that can be read: {title} is to lie there")
    return root, size


def check_layout(root: Path, title: str, folder: str, wanted: Collection[str]) -> None:
    """Refuse a root that lacks files and folders (these end in ``/``) of a layout.

    Args:
        folder: the name that the root has where the data set is published, looked for one level below.

    Raises:
        DataError: says what was looked for, what is missing and what lies there instead.
    """

    def lacking(below: Path) -> list[str]:
        return [name for name in wanted if not (os.path.isdir if name[-1] == "/" else os.path.isfile)(below / name)]

    missing = lacking(root)
    if not missing:
        return
    with _listed(root) as entries:
        held = sorted(entry.name + "/" * entry.is_dir() for entry in entries)
    hint = f". They lie in {root / folder}: name that folder" if not lacking(root / folder) else ""
    raise DataError(
        f"{root} is not laid out as {title}: it lacks {', '.join(missing)} of {', '.join(wanted)}, "
        f"and holds {named(held) or 'nothing'}{hint}"
    )


def _listed(folder: Path) -> Any:
    try:
        return os.scandir(folder)
    except OSError as error:
        raise DataError(f"{folder} cannot be listed: {error}") from error


def refuse_missing(root: Path, missing: Sequence[str], total: int) -> None:
    """One error for all files that a split names and that are not there."""
    if missing:
        raise DataError(
            f"{root} lacks {len(missing)} of the {total} files that its splits name: {named(missing)}. "
            "Fetch them, or limit the number of items to those that are there"
        )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text: {error}") from error


def check_names(path: Path, names: Sequence[str], what: str) -> None:
    """Refuse a list of names from a file that is empty, has a name twice, or a name that leads to another folder."""
    if not names:
        raise DataError(f"{path} names no {what}: the split is empty")
    strange = [name for name in names if name in (".", "..") or set(name) & set("/\\:\0")]
    if strange:
        raise DataError(f"{path} must hold names without a path, got {named(map(repr, strange))}")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"{path} names {named(twice)} more than once")


def read_split(path: Path, count: int | None) -> list[str]:
    """The first ``count`` ids of a split file, one a line; all for None. Blank lines and carriage returns do not count.

    Raises:
        DataError: the file is unreadable or empty, or an id of it stands there twice or has a path in it.
    """
    ids = [line.strip() for line in _text(path).splitlines()]
    ids = [name for name in ids if name]
    check_names(path, ids, "image")
    return ids[:count]


def read_table(path: Path) -> list[list[str]]:
    """The rows of a CSV file, its cells stripped, without blank rows."""
    try:
        rows = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(_text(path), newline=""))]
    except csv.Error as error:
        raise DataError(f"{path} cannot be read as a table: {error}") from error
    return [row for row in rows if any(row)]


def picture_size(path: Path) -> tuple[int, int]:
    """(height, width) of a picture, from its header."""
    with _opened(path) as picture:
        return picture.height, picture.width


def _opened(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except Exception as error:  # what a broken header raises depends on its format
        raise DataError(f"{path} cannot be read as a picture: {error}") from error


def read_picture(path: Path, what: str) -> np.ndarray:
    """The pixels of a picture.

    Args:
        what: ``"rgb"``, colours, whatever the file stores them as; ``"vector"``, three channels of 8 bits as they are
            stored (a fourth is left out); ``"classes"``, one channel of 8 bits as stored, of a palette its indices;
            ``"grey"``, one channel of 8 bits or one bit, 0 to 255; ``"grey 16"``, one channel of 16 bits.

    Returns:
        (H, W, 3) uint8 for rgb and vector; (H, W) uint8 for classes and grey; (H, W) uint16 for grey 16.

    Raises:
        DataError: the file is missing, truncated or no picture, or stores its pixels otherwise; the message names it.
    """
    with _opened(path) as picture:
        if picture.mode not in _CHANNELS[what]:
            raise DataError(f"{path} stores {picture.mode} pixels, expected {' or '.join(_CHANNELS[what])} ({what})")
        if what != "rgb" and picture.format != "PNG":
            raise DataError(f"{path} is {picture.format}, expected PNG: a label must be stored without loss")
        if what == "classes" and _is_stretched(picture):
            raise DataError(f"{path} stores grey of less than 8 bits, which a reader stretches to 0 … 255, expected 8")
        try:
            picture.load()
            if what in ("rgb", "vector"):
                picture = picture.convert("RGB")
            elif what == "grey":
                picture = picture.convert("L")
            pixels = np.asarray(picture)
        except Exception as error:  # what broken pixels raise depends on their format
            raise DataError(f"{path} cannot be read as a picture: {error}") from error
    if what == "grey 16":
        if pixels.min() < 0 or pixels.max() > 65535:
            raise DataError(f"{path} holds {pixels.min()} … {pixels.max()}, expected 16 bits: 0 … 65535")
        pixels = pixels.astype(np.uint16)
    return pixels


def _is_stretched(picture: Image.Image) -> bool:
    """Whether Pillow multiplies stored grey so that its highest value becomes 255: 2 bits by 85, 4 bits by 17."""
    modes = [getattr(tile, "args", None) for tile in getattr(picture, "tile", ())]
    return any(mode in ("L;2", "L;4") for args in modes for mode in (args if isinstance(args, tuple) else (args,)))


def no_direction(stored: np.ndarray) -> np.ndarray:
    """Where vectors of bytes, (H, W, 3) uint8, are grey: all 127 or 128, the bytes next to 0. (H, W) bool."""
    return ((stored == 127) | (stored == 128)).all(2)


def unit_vectors(stored: np.ndarray, unknown: float) -> np.ndarray:
    """n = 2 v / 255 - 1 of bytes v, (H, W, 3) float32, and ``unknown`` throughout where v has no direction."""
    vectors = stored * np.float32(2 / 255) - np.float32(1)
    vectors[no_direction(stored)] = unknown
    return vectors


def above_half(path: Path, stored: np.ndarray) -> np.ndarray:
    """Where a map of bytes, (H, W) uint8, is above half of 255. (H, W) bool.

    Raises:
        DataError: the map holds 0 and 1 alone, which would all be below.
    """
    if stored.max() == 1:
        raise DataError(f"{path} holds 0 and 1, expected 0 … 255: multiply it by 255")
    return stored > 127.5


def read_array(path: Path) -> np.ndarray:
    """A NumPy file of real numbers; never unpickles.

    Raises:
        DataError: the file is missing, truncated or holds something else.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except Exception as error:  # a broken file may raise anything
        raise DataError(f"{path} cannot be read as a NumPy array: {error}") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        kind = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise DataError(f"{path} holds {kind}, expected an array of real numbers")
    return array


def check_classes(path: Path, labels: np.ndarray, classes: int, ignore: int | None = None) -> None:
    """Refuse labels outside 0 … classes - 1, besides ``ignore``."""
    wrong = labels[(labels < 0) | (labels >= classes)]
    if ignore is not None:
        wrong = wrong[wrong != ignore]
    if wrong.size:
        values, counts = np.unique(wrong, return_counts=True)
        pairs = (f"{value} ({count} pixels)" for value, count in zip(values.tolist(), counts.tolist(), strict=True))
        besides = "" if ignore is None else f", or {ignore} where it is unknown"
        raise DataError(f"{path} holds the labels {named(pairs)}, expected 0 … {classes - 1}{besides}")
