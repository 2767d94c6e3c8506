"""What all tests share."""

import sys

import torch


def _import_timm() -> None:
    """timm imports torchvision, whose CUDA build cannot register its operators beside a CPU build of torch."""
    try:
        import timm
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] in ("torchvision", "timm")]:
            del sys.modules[name]
        torch.library.define("torchvision::nms", "(Tensor dets, Tensor scores, float threshold) -> Tensor")
        torch.library.define("torchvision::qnms", "(Tensor dets, Tensor scores, float threshold) -> Tensor")
        import timm  # noqa: F401
    except ImportError:
        pass


_import_timm()
