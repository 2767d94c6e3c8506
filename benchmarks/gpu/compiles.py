"""A pytest plugin: a line for every kernel that Triton compiles or finds in its cache, with the seconds it took.

``cpu`` are the seconds of a core, those of the assembler counted, which other programs on the machine do not change.
"""

import os
import time
from typing import Any

import pytest

from benchmarks.kernels import lines


def pytest_configure(config: pytest.Config) -> None:
    from triton import compiler, knobs

    hits: list[bool] = []
    original = compiler.compile

    def compile(src: Any, *args: Any, **options: Any) -> Any:
        start, cpu = time.perf_counter(), _cpu_seconds()
        kernel = original(src, *args, **options)
        seconds = {"seconds": round(time.perf_counter() - start, 4), "cpu": round(_cpu_seconds() - cpu, 4)}
        lines.write("compile", stage=os.environ.get("DTME_STAGE"), kernel=src.name, hit=hits[-1], **seconds)
        return kernel

    knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
    compiler.compile = compile


def _cpu_seconds() -> float:
    """Of this process and of those that it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
