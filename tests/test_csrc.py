"""The C++ kernels by themselves: their unit test, plain and under the sanitizers, through CMake and ctest.

CI has not the time for all: it watches the memory of this machine's widest instruction set and the threads of the
portable one, as threads are started by the same lines in every set and are slow to watch. ``make everything`` runs
every set, also unwatched.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

from dtme_kernels import registry
from tests.extent import EVERYTHING

ROOT = Path(__file__).parents[1]
MISSING = [tool for tool in ("c++", "cmake", "ninja") if shutil.which(tool) is None]
WIDEST = registry.cpp_module.instruction_sets()[0] if registry.cpp_module else "portable"
# {sanitizers: instruction sets}, the empty string for all
RUNS = {"address,undefined": WIDEST, "thread": "portable"}
if EVERYTHING:
    RUNS = {"": "", "address,undefined": "", "thread": "portable"}


@pytest.mark.skipif(bool(MISSING), reason=f"not found: {', '.join(MISSING)}")
@pytest.mark.parametrize("sanitizer", RUNS)
def test_unit_test(sanitizer, tmp_path):
    options = ["-DDTME_EXTENSION=OFF", f"-DDTME_SANITIZE={sanitizer}", f"-DDTME_ISAS={RUNS[sanitizer]}"]
    for command in (
        ["cmake", "-S", ROOT, "-B", tmp_path, "-G", "Ninja", *options],
        ["cmake", "--build", tmp_path],
        ["ctest", "--test-dir", tmp_path, "--output-on-failure"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "100% tests passed" in done.stdout
