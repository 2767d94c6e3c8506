"""All models of the sweep by name, and the rows of one of them."""

import torch

from benchmarks.clients import import_torchvision

from . import timm_models, torch_models, transformers_models
from .checks import PLANS, Row, check
from .subject import NotBuilt, Subject

LIBRARIES = {
    "transformers": transformers_models,
    "timm": timm_models,
    "torch": torch_models,
    "torchvision": torch_models,
}


def prepare() -> None:
    """Import the libraries, once for all forks."""
    torch.set_num_threads(1)
    import_torchvision()
    import timm  # noqa: F401
    import transformers
    from transformers.models.auto import modeling_auto  # noqa: F401

    transformers.logging.set_verbosity_error()


def names() -> list[str]:
    return [*torch_models.names(), *timm_models.names(), *transformers_models.names()]


def build(name: str) -> Subject:
    return LIBRARIES[name.split("/")[0]].build(name)  # type: ignore[attr-defined]


def rows(name: str) -> list[Row]:
    """What came of every plan, or why the model was not built. A model is built anew for every plan."""
    made = []
    for kind in PLANS:
        try:
            made.append(check(build(name), kind))
        except NotBuilt as error:
            return [{"model": name, "plan": "build", "outcome": "not built", "reason": str(error)}]
    return made
