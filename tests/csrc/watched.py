"""Any Python command with C++ kernels that AddressSanitizer and UndefinedBehaviorSanitizer watch::

    python -m tests.csrc.watched BUILD_FOLDER -- -m pytest tests/kernels/test_covariance.py -q

builds ``_C`` for the portable instruction set and this machine's widest and runs ``python -m pytest ...`` with it, in a
copy of the repository made of symbolic links: no other ``_C`` is used or touched. What is found ends the process.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WIDEST = "import dtme_kernels.registry as r; print(r.cpp_module.instruction_sets()[0] if r.cpp_module else 'portable')"


def link(folder: Path) -> Path:
    """Returns the folder to run in. _build.json stays away: it is about another library."""
    overlay = folder / "repository"
    (overlay / "dtme_kernels").mkdir(parents=True, exist_ok=True)
    for source, target in ((ROOT, overlay), (ROOT / "dtme_kernels", overlay / "dtme_kernels")):
        for path in source.iterdir():
            if path.suffix != ".so" and not path.name.startswith((".", "dtme_kernels", "__pycache__", "_build.")):
                (target / path.name).unlink(missing_ok=True)
                (target / path.name).symlink_to(path)
    return overlay


def build(folder: Path, target: Path) -> None:
    widest = subprocess.check_output([sys.executable, "-c", WIDEST], cwd=ROOT, text=True).strip()
    options = {
        "DTME_SANITIZE": "address,undefined",
        "DTME_ISAS": "portable" if widest == "portable" else f"portable;{widest}",
        "DTME_TESTS": "OFF",
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": target,
        "Python_EXECUTABLE": sys.executable,
    }
    command = ["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja"]
    subprocess.run([*command, *(f"-D{key}={value}" for key, value in options.items())], check=True)
    subprocess.run(["cmake", "--build", folder], check=True)


def run(overlay: Path, *arguments: str) -> int:
    find, names = os.environ.get("CXX", "c++"), ("libasan.so", "libubsan.so", "libstdc++.so")
    asked = [subprocess.check_output([find, f"-print-file-name={name}"], text=True).strip() for name in names]
    settings = {  # Python has no sanitizers: theirs comes first, and the library whose exceptions they follow
        "LD_PRELOAD": " ".join(asked),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",  # Python frees little at its end
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": f"{overlay}{os.pathsep}{overlay / 'python'}",
    }
    return subprocess.run([sys.executable, *arguments], cwd=overlay, env={**os.environ, **settings}).returncode


if __name__ == "__main__":
    if sys.argv[2:3] != ["--"]:
        sys.exit(__doc__)
    build((where := link(Path(sys.argv[1]).absolute())).parent / "cmake", where / "dtme_kernels")
    sys.exit(run(where, *sys.argv[3:]))
