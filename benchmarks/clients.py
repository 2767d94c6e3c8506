"""transformers and timm import torchvision, whose published build wants CUDA and fails beside a CPU build of torch."""

import sys
from importlib.util import find_spec

import torch


def import_torchvision() -> None:
    """Import torchvision if it is installed; where its operators are missing, declare the two that its import needs."""
    if find_spec("torchvision") is None:
        return
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        torch.library.define("torchvision::nms", "(Tensor dets, Tensor scores, float threshold) -> Tensor")
        torch.library.define("torchvision::qnms", "(Tensor dets, Tensor scores, float threshold) -> Tensor")
        import torchvision  # noqa: F401
