"""The JSON files of this package: read strictly, by kind, version, fields and checksum."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import dtme_kernels

from .checks import Record
from .files import write_beside

MAX_DEPTH = 32
"""Lists in lists in lists: more are of no file of ours, and Python could not walk through all that a file can hold."""


class Document(NamedTuple):
    """A file that was read: its kind, version and fields are right."""

    where: str
    content: dict[str, Any]
    """The fields, made into what they stand for."""
    plain: dict[str, Any]
    """The fields as JSON has them, without kind, version, release and checksum."""
    checksum: str | None
    """Which it was written with."""

    def check(self) -> None:
        """ValueError where it is not what was written."""
        if self.checksum is not None and self.checksum != checksum(self.plain):
            raise ValueError(
                f"{self.where} is damaged, or was changed after it was saved: its checksum is that of other values. If "
                "the change is meant, delete its field 'checksum'"
            )


class Format(NamedTuple):
    """A kind of file: who reads it asks for its kind, a version it knows, every field by its check and no other.

    Args:
        kind: heads every file.
        fields: checks them.
        version: that is written; all down to 1 are read.
        by_hand: people edit these files: they have no checksum, and do not say which release wrote them.
    """

    kind: str
    fields: Record
    version: int = 1
    by_hand: bool = False

    def dump(self, content: dict[str, Any], indent: int | None = None) -> str:
        """``content`` as the text of a file; ValueError where it holds a number that is not finite."""
        head: dict[str, Any] = {"format": self.kind, "version": self.version}
        if not self.by_hand:
            plain = json.loads(json.dumps(content))  # as it will be read: tuples are lists, keys are strings
            head |= {"release": dtme_kernels.__version__}
            content = {**content, "checksum": checksum(plain)}
        return json.dumps({**head, **content}, indent=indent, allow_nan=False)

    def parse(self, text: str | bytes, where: str) -> Document:
        """ValueError that names ``where`` the text is from and what is wrong with it.

        The checksum is not looked at: what else is wrong with a file says more (``Document.check`` then).
        """
        plain = parse_json(text, where)
        if not isinstance(plain, dict) or plain.get("format") != self.kind:
            raise ValueError(f"{where} is not a {self.kind} file: its 'format' field must be {self.kind!r}")
        self._check_version(plain.get("version"), plain.get("release"), where)
        digest = None
        if not self.by_hand:
            plain.pop("release", None)
            if not isinstance(digest := plain.pop("checksum", ""), str):
                raise ValueError(f"{where} is damaged: its checksum must be a string, got {digest!r}")
        del plain["format"], plain["version"]
        try:
            return Document(where, self.fields(plain), plain, digest or None)
        except ValueError as error:
            says = str(error)
            if says.startswith(("lacks the field", "has the unknown field")):
                raise ValueError(f"{where} {says}") from error
            raise ValueError(f"{where}{':' if self.by_hand else ' is damaged:'} {says}") from error

    def _check_version(self, version: Any, release: Any, where: str) -> None:
        known = "version 1" if self.version == 1 else f"versions 1 to {self.version}"
        if type(version) is not int or version < 1:
            raise ValueError(f"{where} has version {version!r}, which no release wrote; this release reads {known}")
        if version > self.version:
            by = f" by release {release}" if isinstance(release, str) else ""
            raise ValueError(
                f"{where} has version {version}, written{by} after this release ({dtme_kernels.__version__}), which "
                f"reads {known}: update dtme-kernels to read it"
            )

    def save(self, path: str | os.PathLike[str], content: dict[str, Any]) -> None:
        """Write it so that people can read it."""
        text = self.dump(content, indent=1)
        write_beside(Path(path), lambda beside: beside.write_text(text + "\n", encoding="utf-8"))

    def load(self, path: str | os.PathLike[str]) -> Document:
        return self.parse(Path(path).read_bytes(), str(path))


def checksum(plain: dict[str, Any]) -> str:
    """Of the values, however a file lays them out."""
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def parse_json(text: str | bytes, where: str) -> Any:
    """What JSON says, and nothing beyond: no key twice, no NaN, no number that no float holds, no endless nesting."""
    try:
        value = json.loads(
            text.decode("utf-8") if isinstance(text, bytes) else text,
            object_pairs_hook=_without_repeats,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
    except RecursionError:
        raise ValueError(f"{where} is not valid JSON of ours: it is nested too deeply") from None
    except ValueError as error:  # also of the decoder, of UTF-8 and of integers with thousands of digits
        raise ValueError(f"{where} is not valid JSON: {error}") from error
    _check_values(value, where)
    return value


def _check_values(value: Any, where: str) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        if any(isinstance(one, str) and not is_whole(one) for one in level):
            raise ValueError(f"{where} is not valid JSON of ours: a string holds half of a character")
        lists = [list(one.values()) if isinstance(one, dict) else one for one in level if isinstance(one, (dict, list))]
        level = [one for values in lists for one in values]
    if level:
        raise ValueError(f"{where} is not valid JSON of ours: it is nested too deeply")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {repeated!r} is there twice")
    if not all(map(is_whole, found)):
        raise ValueError("a key holds half of a character")
    return found


def is_whole(text: str) -> bool:
    """Whether it can be written: JSON can spell halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _finite(digits: str) -> float:
    if abs(value := float(digits)) == float("inf"):
        raise ValueError(f"the number {digits[:40]} is too large")
    return value
