"""The optional C++ extension ``dtme_kernels._C``: load its kernels, or find out why there are none.

Its absence never raises: everything then runs on the reference, and ``python -m dtme_kernels.info`` tells why.
"""

import json
from hashlib import sha256
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

BUILD = Path(__file__).with_name("_build.json")  # written by setup.py: what was built, or why nothing was


def load() -> tuple[Any, str | None]:
    """Register the kernels with the dispatcher. Returns the module, or None and the reason."""
    spec = find_spec(f"{__package__}._C")
    build = _build()
    if spec is None or spec.origin is None:
        reason = build.get(
            "not built", "the C++ extension was not built: `pip install .` builds it with a C++ compiler"
        )
        return None, reason
    if why := _too_short(Path(spec.origin), build):
        return None, why
    try:
        return import_module(spec.name), None
    except (ImportError, OSError) as error:  # another CPU, Python or torch
        return None, f"{Path(spec.origin).name} does not load: {error}"


def _build() -> dict[str, Any]:
    try:
        return dict(json.loads(BUILD.read_text()))
    except (OSError, ValueError):
        return {}


def _too_short(library: Path, build: dict[str, Any]) -> str | None:
    """A truncated library would not fail to load but kill the process.

    One that has grown since it was built is not damaged: packagers add paths to libraries.
    """
    expected = build.get("bytes")
    if build.get("file") != library.name or not isinstance(expected, int):
        return None
    try:
        size = library.stat().st_size
    except OSError as error:
        return f"{library.name} cannot be read: {error.strerror}"
    if size >= expected:
        return None
    return f"{library.name} is damaged: it is not what was built ({size:,} of {expected:,} bytes); reinstall"


def is_as_built(library: Path) -> bool | None:
    """Whether the checksum of what was built is still that of the library; None where a packager has changed it."""
    build, content = _build(), library.read_bytes()
    if build.get("file") != library.name or len(content) != build.get("bytes"):
        return None
    return sha256(content).hexdigest() == build.get("sha256")
