"""Triton's own NVIDIA driver and launcher on a machine without a GPU, over a libcuda that records and computes nothing.

Tensors live on the CPU. The kernels compile for sm_90 and are launched through the real path: specialisation, cache,
C launcher. Their outputs are whatever the memory held, so nothing that runs under this driver is ever right or wrong.
What torch would compute of large tensors gives zeros instead. What remains is what a run on a GPU costs before
anything is computed, and the kernels in Triton's cache.

Used as a pytest plugin, or by ``activate``. Works with Triton 3.6 to 3.9; wants gcc.
"""

import ctypes
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ..cache import act_as_there

SOURCE = Path(__file__).with_name("libcuda.c")
LARGE = 2**18  # elements


def build() -> Path:
    """The folder with the recording ``libcuda.so.1``, which is compiled once for every version of the source."""
    import triton

    include = Path(triton.__file__).parent / "backends/nvidia/include"
    version = hashlib.sha256(SOURCE.read_bytes() + str(include).encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"dtme-recording-driver-{os.getuid()}-{version}"
    library = folder / "libcuda.so.1"
    if not library.exists():
        folder.mkdir(exist_ok=True)
        partial = folder / f"libcuda.so.{os.getpid()}"
        options = ["-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", f"-I{include}"]
        subprocess.run(["gcc", *options, str(SOURCE), "-o", str(partial)], check=True)
        partial.rename(library)  # at once, whoever else builds it
    return folder


def activate() -> None:
    """From here on Triton compiles for sm_90, launches into the recorder, and takes the kernels' CPU tensors."""
    assert os.environ.get("TRITON_INTERPRET") != "1", "Triton's interpreter launches nothing"
    folder = build()
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    _library(folder)
    act_as_there()
    from triton.runtime import driver

    driver.set_active(_driver())
    from dtme_kernels import launch, registry

    launch.interpreted = lambda: True
    registry.AUTOMATIC["cpu"] = "triton"
    _Uncomputed().__enter__()


def launches() -> int:
    """How many there were in this process."""
    return _library(build()).recorded_launches()


def pytest_configure(config: Any) -> None:
    activate()


def _library(folder: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
    library.recorded_launches.restype = library.recorded_loads.restype = ctypes.c_long
    return library


def _driver() -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver as nvidia

    class RecordingDriver(nvidia.CudaDriver):  # type: ignore[misc]
        def __init__(self) -> None:
            self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device=0: 0
            self.set_current_device = lambda device: None
            self.get_device_capability = lambda device=0: (9, 0)

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    return RecordingDriver()


class _Uncomputed(TorchDispatchMode):
    """What torch would compute of large tensors is zeros at once; views, and what is written in place, are real."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function.namespace != "aten" or not _makes_new_tensors(function._schema) or not _large(args):
            return function(*args, **kwargs)
        try:
            shapes = function(*tree_map(_to_meta, args), **tree_map(_to_meta, kwargs))
        except (NotImplementedError, RuntimeError):  # the shape depends on the values, or another device is named
            return function(*args, **kwargs)
        made = [x for x in tree_leaves(shapes) if x is not None]
        if not all(x.is_floating_point() for x in made):  # a question, whether all is finite, say
            return function(*args, **kwargs)
        return tree_map(_zeros, shapes)


def _makes_new_tensors(schema: Any) -> bool:
    return not any(x.alias_info for x in (*schema.arguments, *schema.returns)) and all(
        str(x.type) == "Tensor" for x in schema.returns
    )


def _large(args: Any) -> bool:
    return any(isinstance(x, torch.Tensor) and x.numel() >= LARGE for x in tree_leaves(args))


def _to_meta(x: Any) -> Any:
    return x.to("meta") if isinstance(x, torch.Tensor) else x


def _zeros(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cpu").zero_()
