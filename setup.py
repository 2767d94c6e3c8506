"""The optional C++ extension. All else is in pyproject.toml; what is compiled, and how, in CMakeLists.txt.

DTME_BUILD_EXT=auto (the default) builds it where that is possible and else installs without it, with a warning; 1 makes
a failure an error; 0 does not try. CMAKE_ARGS goes to cmake: -DDTME_ISAS=portable builds a third of it in a third of
the time. What became of it is left in dtme_kernels/_build.json, for dtme_kernels.info.

Only torch's headers and libtorch_cpu are needed, not torch itself at work: under build isolation they are found in the
environment that the package is installed into, so that no second torch is downloaded for the build.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from hashlib import sha256
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
MODE = os.environ.get("DTME_BUILD_EXT", "auto")
SOURCES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*.cpp"))  # as in CMakeLists.txt


class NotBuilt(Exception):
    """Why the extension cannot be built here."""


def find_torch() -> Path:
    places = [sysconfig.get_paths()[kind] for kind in ("platlib", "purelib")] + sys.path
    for place in places:
        torch = Path(place) / "torch"
        if (torch / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
            return torch
    raise NotBuilt(
        "torch was not there when the package was built: install torch >= 2.10 first, then this package again with"
        " `pip install --force-reinstall --no-deps`"
    )


def find_program(*names: str) -> str:
    # those that pip has put into the build's own environment come first on PATH
    for name in names:
        if found := shutil.which(name):
            return found
    raise NotBuilt(f"{' or '.join(names)} was not found when the package was built")


def find_compiler() -> str:
    return os.environ.get("CXX") or find_program("c++", "g++", "clang++")


class BuildWithCMake(build_ext):
    """One build description for pip and for the C++ unit test."""

    def run(self) -> None:
        target = Path(self.get_ext_fullpath("dtme_kernels._C"))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        facts: dict[str, object] = {}
        try:
            if MODE == "0":
                raise NotBuilt("it was switched off when the package was built: DTME_BUILD_EXT=0")
            self.build_library(target)
            content = target.read_bytes()
            facts = {"file": target.name, "bytes": len(content), "sha256": sha256(content).hexdigest()}
        except NotBuilt as reason:
            if MODE == "1":
                sys.exit(f"dtme-kernels: DTME_BUILD_EXT=1, but the C++ extension cannot be built: {reason}")
            facts = {"not built": str(reason)}
            print(f"dtme-kernels: WARNING: without C++ kernels, {reason}. Everything works, slower on the CPU.")
        target.with_name("_build.json").write_text(json.dumps(facts, indent=2) + "\n")

    def build_library(self, target: Path) -> None:
        torch, compiler = find_torch(), find_compiler()
        cmake, ninja = find_program("cmake"), find_program("ninja")
        build = Path(self.build_temp).absolute() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        options = {
            "CMAKE_CXX_COMPILER": compiler,
            "CMAKE_MAKE_PROGRAM": ninja,
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": target.parent.absolute(),
            "Python_EXECUTABLE": sys.executable,
            "DTME_TORCH": torch,
            "DTME_TESTS": "OFF",
        }
        self.call(
            *(cmake, "-S", ROOT, "-B", build, "-G", "Ninja"),
            *(f"-D{key}={value}" for key, value in options.items()),
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        )
        self.call(cmake, "--build", build)

    def call(self, *command: object) -> None:
        done = subprocess.run(
            [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        print(done.stdout)
        if done.returncode:
            errors = [line for line in done.stdout.splitlines() if "rror" in line]
            raise NotBuilt(f"building it failed: {(errors or done.stdout.splitlines() or ['no output'])[0].strip()}")

    # an editable install looks for what was built beside the sources, and finds it there already
    def copy_extensions_to_source(self) -> None:
        pass

    def get_outputs(self) -> list[str]:
        target = Path(self.get_ext_fullpath("dtme_kernels._C"))
        return [str(path) for path in (target, target.with_name("_build.json")) if path.exists()]


if MODE not in ("auto", "0", "1"):
    sys.exit(f"dtme-kernels: DTME_BUILD_EXT must be auto, 0 or 1, got {MODE!r}")
setup(ext_modules=[Extension("dtme_kernels._C", SOURCES, optional=True)], cmdclass={"build_ext": BuildWithCMake})
