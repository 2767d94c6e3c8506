"""Everything here runs on a CUDA device, which is the default device of every test; recorded, on the CPU."""

from pathlib import Path

import pytest
import torch

from benchmarks.kernels.device import RECORDING


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not (torch.cuda.is_available() or RECORDING):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _on_the_gpu():
    with torch.device("cpu" if RECORDING else "cuda"):
        yield


@pytest.fixture(params=["auto", "triton"])
def impl(request):
    dtype = request.node.callspec.params.get("dtype")
    if request.param == "triton" and (dtype == torch.float64 or request.node.get_closest_marker("float64")):
        pytest.skip("float64 is the reference's")
    return request.param
