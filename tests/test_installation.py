"""Installing: from an sdist, with a compiler and without, and what is left when the extension is broken.

Environments are clean but for torch and what it needs, which are this one's.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SITE = Path(sysconfig.get_paths()["purelib"])
CHECK = """
import pkgutil, torch, dtme, dtme_kernels as dk
from dtme_kernels import registry
for package in (dtme, dk):  # every file is there
    assert sum(1 for _ in pkgutil.walk_packages(package.__path__, package.__name__ + ".")) > 20
tokens = torch.arange(12.0).view(4, 3)
assert torch.equal(dk.token_covariance(tokens), tokens.T @ tokens)
torch.testing.assert_close(dk.modulate(tokens[None], torch.ones(2, 3), torch.ones(2, 3))[1], tokens[None] + 1)
print(registry.OPERATORS["modulate"].automatic("cpu"), registry.cpp_missing)
"""

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")


def run(*command, cwd, check=True, **variables):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | variables
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert not check or done.returncode == 0, done.stdout
    return done


def environment(path):
    """A virtual environment in which torch is installed, and nothing else. Returns its python."""
    run(sys.executable, "-m", "venv", path, cwd=path.parent)
    (site,) = path.glob("lib/python*/site-packages")
    (site / "torch").symlink_to(SITE / "torch")
    # what torch and dtme import, but not what is installed there for development: that takes its own .pth file
    (site / "needed.pth").write_text(f"{SITE}\n")
    return path / "bin" / "python"


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """Of the files under version control, so that nothing is found by accident."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("sdist")
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    script = f"from setuptools.build_meta import build_sdist; build_sdist({str(out)!r})"
    run(sys.executable, "-c", script, cwd=tree)
    (archive,) = out.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def installed(sdist, tmp_path_factory):
    """The wheel that pip builds in isolation, in an environment of its own: (python, wheel)."""
    folder = tmp_path_factory.mktemp("installed")
    python = environment(folder / "venv")
    # one instruction set takes a third of the time; all of them are in the environment that runs this
    options = {"DTME_BUILD_EXT": "1", "CMAKE_ARGS": "-DDTME_ISAS=portable"}
    run(python, "-m", "pip", "wheel", "--no-deps", "-w", folder, sdist, cwd=folder, **options)
    (wheel,) = folder.glob("*.whl")
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel, cwd=folder)
    return python, wheel


def outcome(python, cwd):
    """(what modulate runs on, why not C++), and the text of info."""
    impl, why = run(python, "-c", CHECK, cwd=cwd).stdout.strip().split(maxsplit=1)
    return impl, why, run(python, "-m", "dtme_kernels.info", cwd=cwd).stdout


def test_sdist_is_complete(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"setup.py", "CMakeLists.txt", "LICENSE", "README.md", "tests/csrc/main.cpp"}
    wanted |= {str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*.[ch]*")}
    assert wanted <= names
    assert not any(name.endswith((".so", "_build.json")) for name in names)


def test_wheel_from_the_sdist_carries_the_extension(installed, tmp_path):
    python, wheel = installed
    names = zipfile.ZipFile(wheel).namelist()
    (library,) = (name for name in names if name.endswith(".so"))
    assert library.startswith("dtme_kernels/_C.")
    assert "dtme_kernels/_build.json" in names
    assert "dtme/py.typed" in names
    assert not any(name.startswith(("csrc", "tests")) for name in names)
    impl, why, info = outcome(python, tmp_path)
    assert (impl, why) == ("cpp", "None")
    assert "for torch 2.10 and later" in info


def test_two_processes_import_at_once(installed, tmp_path):
    python, _ = installed
    runs = [subprocess.Popen([python, "-c", CHECK], cwd=tmp_path, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [each.communicate()[0] for each in runs] == ["cpp None\n"] * 2


def truncate(content):
    return content[: len(content) // 2]


def flip(content):
    middle = len(content) // 2
    return content[:middle] + bytes(255 - byte for byte in content[middle : middle + 64]) + content[middle + 64 :]


def garbage(content):
    return b"not a library" * (len(content) // 13 + 1)


@pytest.mark.parametrize("damage", [truncate, garbage])
def test_a_damaged_extension_leaves_the_reference(installed, tmp_path, damage):
    python, _ = installed
    (library,) = python.parents[1].glob("lib/python*/site-packages/dtme_kernels/_C*.so")
    content = library.read_bytes()
    try:
        library.write_bytes(damage(content))
        impl, why, info = outcome(python, tmp_path)
    finally:
        library.write_bytes(content)
    assert impl == "reference"
    assert ("does not load" if damage is garbage else "is damaged") in why
    assert why in info
    assert outcome(python, tmp_path)[0] == "cpp"


def test_info_tells_of_changed_bytes(installed, tmp_path):
    """Reading all of a library takes longer than loading it, so ``import`` does not."""
    python, _ = installed
    (library,) = python.parents[1].glob("lib/python*/site-packages/dtme_kernels/_C*.so")
    content = library.read_bytes()
    assert "DAMAGED" not in outcome(python, tmp_path)[2]
    try:
        library.write_bytes(flip(content))
        assert "DAMAGED, it is not what was built: reinstall" in outcome(python, tmp_path)[2]
    finally:
        library.write_bytes(content)


def without_compiler(python):
    """PATH with nothing but the environment's own programs."""
    return {"PATH": str(python.parent), "CXX": ""}


def test_without_a_compiler_it_installs_warns_and_works(sdist, tmp_path):
    python = environment(tmp_path / "venv")
    install = run(python, "-m", "pip", "install", "-v", "--no-deps", sdist, cwd=tmp_path, **without_compiler(python))
    assert "WARNING: without C++ kernels, c++ or g++ or clang++ was not found" in install.stdout
    impl, why, info = outcome(python, tmp_path)
    assert impl == "reference"
    assert why == "c++ or g++ or clang++ was not found when the package was built"
    assert why in info
    asked = run(python, "-m", "pip", "install", "--no-deps", "--force-reinstall", sdist, cwd=tmp_path, check=False,
                DTME_BUILD_EXT="1", **without_compiler(python))  # fmt: skip
    assert asked.returncode != 0
    assert (
        "DTME_BUILD_EXT=1, but the C++ extension cannot be built: c++ or g++ or clang++ was not found" in asked.stdout
    )


def test_before_torch_or_switched_off_it_is_pure_python(sdist, tmp_path):
    empty = tmp_path / "venv"
    run(sys.executable, "-m", "venv", empty, cwd=tmp_path)
    for variables, why in (
        ({"DTME_BUILD_EXT": "auto"}, "torch was not there when the package was built"),
        ({"DTME_BUILD_EXT": "0"}, "switched off when the package was built"),
    ):
        out = tmp_path / variables["DTME_BUILD_EXT"]
        run(empty / "bin" / "python", "-m", "pip", "wheel", "--no-deps", "-w", out, sdist, cwd=tmp_path, **variables)
        (wheel,) = out.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            assert not any(name.endswith(".so") for name in archive.namelist())
            assert why in archive.read("dtme_kernels/_build.json").decode()
    refused = run(empty / "bin" / "python", "-m", "pip", "wheel", "--no-deps", sdist, cwd=tmp_path, check=False,
                  DTME_BUILD_EXT="yes")  # fmt: skip
    assert "DTME_BUILD_EXT must be auto, 0 or 1, got 'yes'" in refused.stdout


def test_every_package_is_named_for_the_wheel():
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11

    named = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {
        ".".join(path.parent.relative_to(base).parts)
        for base, package in ((ROOT / "python", "dtme"), (ROOT, "dtme_kernels"))
        for path in (base / package).rglob("__init__.py")
    }
    assert named == folders
