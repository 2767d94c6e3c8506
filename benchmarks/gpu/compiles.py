"""A pytest plugin: a line for every kernel that Triton compiles or finds in its cache, with the seconds it took."""

import os
from typing import Any

import pytest

from benchmarks.kernels import lines


def pytest_configure(config: pytest.Config) -> None:
    from triton import knobs

    knobs.compilation.listener = _write


def _write(*, src: Any, times: Any, cache_hit: bool, **_: Any) -> None:
    seconds, stage = times.total / 1e6, os.environ.get("DTME_STAGE")
    lines.write("compile", stage=stage, kernel=src.name, seconds=round(seconds, 4), hit=cache_hit)
