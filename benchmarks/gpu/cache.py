"""Triton's cache, filled on any machine and carried in one file to the one with the GPU.

A kernel is found again if nothing differs that its key is made of: Triton's own files with its library, the kernel's
text and line numbers, the target, the options, the types and alignment of the arguments. The index of a kernel's files
holds absolute paths, so the cache has one path on both machines.

Triton's library, and every launcher that it builds, are made for one version of Python. ``DTME_TRITON_THERE`` names an
interpreter of the version that the other machine has, with the Triton that the other machine has: keys are then what
that interpreter computes, and launchers are built for it too. The kernels are compiled by the Triton that runs.
"""

import hashlib
import json
import os
import subprocess
import sysconfig
import tarfile
from pathlib import Path
from typing import Any
from unittest import mock

FOLDER = Path("/tmp/dtme-triton-cache")
ARCHIVE = Path("out/gpu-cache.tar")
THERE = "DTME_TRITON_THERE"
FACTS = """
import json, sysconfig, triton
from triton.runtime.cache import triton_key
paths = sysconfig.get_paths(scheme="posix_prefix")
print(json.dumps([triton.__version__, triton_key(), sysconfig.get_config_var("EXT_SUFFIX"), paths["include"]]))
"""


def environment() -> dict[str, str]:
    """What every process has to have that fills the cache or takes from it."""
    return {"TRITON_CACHE_DIR": str(FOLDER), "TRITON_STORE_BINARY_ONLY": "1"}


def unpack() -> bool:
    """Whether there was an archive."""
    if not ARCHIVE.exists():
        return False
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(FOLDER, filter="data")
    return True


def pack() -> int:
    """Bytes of the archive. Launchers for the Python that runs this are left out where another one's are wanted."""
    left_out = str(sysconfig.get_config_var("EXT_SUFFIX")) if os.environ.get(THERE) else "nothing"
    ARCHIVE.parent.mkdir(exist_ok=True)
    with tarfile.open(ARCHIVE, "w:gz") as archive:
        archive.add(FOLDER, ".", filter=lambda member: None if member.name.endswith(left_out) else member)
    return ARCHIVE.stat().st_size


def act_as_there() -> None:
    """From here on this process's keys and launchers are also those of ``DTME_TRITON_THERE``, if that is set."""
    if not os.environ.get(THERE):
        return
    import triton
    from triton.backends.nvidia import driver
    from triton.runtime import build, cache

    found = subprocess.run([os.environ[THERE], "-I", "-c", FACTS], check=True, capture_output=True, text=True).stdout
    version, key, suffix, include = json.loads(found)
    assert version == triton.__version__, f"Triton is {version} there and {triton.__version__} here"
    cache.triton_key = lambda: key
    if hasattr(driver, "compile_module_from_src"):  # Triton 3.9 has one launcher for all kernels
        driver.compile_module_from_src = _building_for_both(build, suffix, include)


def _building_for_both(build: Any, suffix: str, include: str) -> Any:
    """``compile_module_from_src``, which leaves a library for the other Python beside the one that it loads."""
    original = build.compile_module_from_src

    def compile_module_from_src(src: str, name: str, **options: Any) -> Any:
        with (
            mock.patch.object(sysconfig, "get_config_var", lambda variable: suffix),
            mock.patch.object(sysconfig, "get_paths", lambda scheme: {"include": include}),
            mock.patch.object(build, "_load_module_from_path", lambda name, path: path),
        ):
            library = Path(original(src, name, **options)).read_bytes()
        for linkage in ("ELF", ""):  # which Python knows only where the program `file` is installed
            key = ",".join([*build.platform_key().split(",")[:-1], linkage])
            manager = build.get_cache_manager(hashlib.sha256((src + key).encode("utf-8")).hexdigest())
            if manager.get_file(name + suffix) is None:
                manager.put(library, name + suffix, binary=True)
        return original(src, name, **options)

    return compile_module_from_src
