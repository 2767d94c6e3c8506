"""The C++ kernels by themselves: their unit test, plain and under the sanitizers, through CMake and ctest."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MISSING = [tool for tool in ("c++", "cmake", "ninja") if shutil.which(tool) is None]


@pytest.mark.skipif(bool(MISSING), reason=f"not found: {', '.join(MISSING)}")
@pytest.mark.parametrize("sanitizer", ["", "address,undefined", "thread"])
def test_unit_test(sanitizer, tmp_path):
    options = ["-DDTME_EXTENSION=OFF", f"-DDTME_SANITIZE={sanitizer}"]
    for command in (
        ["cmake", "-S", ROOT, "-B", tmp_path, "-G", "Ninja", *options],
        ["cmake", "--build", tmp_path],
        # threads are started by the same lines in every instruction set, and are slow to watch
        ["ctest", "--test-dir", tmp_path, "--output-on-failure", "-R", "portable" if sanitizer == "thread" else "."],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "100% tests passed" in done.stdout
