"""Files that are either the old one or the new one, never half of either."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_beside(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a new file in the same folder, flush it to disk, then rename it to ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # the name keeps its suffix: some writers choose the format by it
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    beside = Path(name)
    try:
        write(beside)
        mask = os.umask(0)
        os.umask(mask)
        beside.chmod(0o666 & ~mask)  # mkstemp is private to the user; a result should be as readable as any file
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def save_json(path: str | os.PathLike[str], kind: str, content: dict[str, Any]) -> None:
    """Write ``content`` as readable JSON headed by its kind and format version."""
    text = json.dumps({"format": kind, "version": 1, **content}, indent=1)
    write_beside(Path(path), lambda beside: beside.write_text(text + "\n"))


def load_json(
    path: str | os.PathLike[str], kind: str, fields: set[str], optional: set[str] | None = None
) -> dict[str, Any]:
    """Read what ``save_json`` wrote; ValueError naming the file where it is damaged, foreign or too new."""
    try:
        content = json.loads(Path(path).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != kind:
        raise ValueError(f"{path} is not a {kind} file: its 'format' field must be {kind!r}")
    if content.get("version") != 1:
        raise ValueError(f"{path} has version {content.get('version')!r}; this release reads version 1")
    del content["format"], content["version"]
    if missing := fields - content.keys():
        raise ValueError(f"{path} lacks the field {min(missing)!r}")
    if unknown := content.keys() - fields - (optional or set()):
        raise ValueError(f"{path} has the unknown field {min(unknown)!r}")
    return content
