"""What trainers ask of a model and only its backbone can do, or say."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

ENABLE = ("activation_checkpointing_enable", "gradient_checkpointing_enable", "set_grad_checkpointing")
"""How activation checkpointing is switched on in transformers, in its earlier releases, and in timm."""
DISABLE = ("activation_checkpointing_disable", "gradient_checkpointing_disable", "set_grad_checkpointing")

DEFAULTS = {"every_n_layers": 1, "offload": False}
"""Options that transformers' ``Trainer`` always gives, and earlier releases do not know."""


class BackboneMethods:
    """The part of a transformers model's interface that trainers use, carried out by ``self.backbone``.

    Where the backbone has nothing of the kind, a method raises AttributeError that says so, and an attribute is
    missing, so that ``hasattr`` is right.
    """

    backbone: nn.Module

    base_model_prefix = "backbone"
    """Where transformers, and PEFT with it, look for the model whose names a file may have without a prefix."""
    accepts_loss_kwargs = False
    """What transformers' ``Trainer`` would give to a forward that takes ``**inputs``, the backbone may not know."""
    _keys_to_ignore_on_save: list[str] | None = None
    """Trainer reads it of whatever model lacks names in a file, as those of tied weights."""

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """As ``activation_checkpointing_enable``, its name in earlier releases of transformers."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Let the backbone recompute its blocks in the backward pass instead of keeping their activations.

        Args:
            activation_checkpointing_kwargs: for ``torch.utils.checkpoint.checkpoint``; transformers only.
            options: of the backbone's own method.

        Raises:
            AttributeError: nothing in the backbone can be told to.
            ValueError: options for a backbone of timm, whose method takes none.
        """
        given = {name: value for name, value in options.items() if value != DEFAULTS.get(name, ...)}
        for module, name in self._those_with(ENABLE):
            if name == "set_grad_checkpointing":
                if activation_checkpointing_kwargs or given:
                    wrong = sorted({**(activation_checkpointing_kwargs or {}), **given})
                    raise ValueError(f"{type(module).__name__}.set_grad_checkpointing takes no options, got {wrong}")
                getattr(module, name)(True)
            else:
                getattr(module, name)(activation_checkpointing_kwargs, **given)

    def gradient_checkpointing_disable(self) -> None:
        """As ``activation_checkpointing_disable``, its name in earlier releases of transformers."""
        self.activation_checkpointing_disable()

    def activation_checkpointing_disable(self) -> None:
        """Keep all activations again. AttributeError where nothing in the backbone can be told to."""
        for module, name in self._those_with(DISABLE):
            getattr(module, name)(*([False] if name == "set_grad_checkpointing" else []))

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether any part of the backbone is checkpointed."""
        names = ("gradient_checkpointing", "grad_checkpointing")  # of transformers and of timm
        return any(getattr(module, name, False) is True for module in self.backbone.modules() for name in names)

    @property
    def is_activation_checkpointing(self) -> bool:
        """As ``is_gradient_checkpointing``."""
        return self.is_gradient_checkpointing

    def enable_input_require_grads(self) -> None:
        """Let gradients reach the output of the embeddings, as reentrant checkpointing of frozen blocks needs it."""
        for module, name in self._those_with(("enable_input_require_grads",)):
            getattr(module, name)()

    def disable_input_require_grads(self) -> None:
        """Undo ``enable_input_require_grads``."""
        for module, name in self._those_with(("disable_input_require_grads",)):
            getattr(module, name)()

    def get_input_embeddings(self) -> nn.Module:
        """The embeddings of the backbone."""
        ((module, name), *_) = self._those_with(("get_input_embeddings",))
        found: nn.Module = getattr(module, name)()
        return found

    @property
    def config(self) -> Any:
        """The backbone's configuration; missing where it has none of transformers' kind, which trainers write to."""
        found = self.backbone.config
        if not hasattr(found, "to_dict"):
            raise AttributeError(f"the config of {type(self.backbone).__name__} is a {type(found).__name__}")
        return found

    @property
    def main_input_name(self) -> Any:
        """What the backbone calls its input; missing where it does not say."""
        return self.backbone.main_input_name

    @property
    def device(self) -> torch.device:
        """The device of the first parameter."""
        return next((p.device for p in self.backbone.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first parameter of floating point."""
        dtypes = (p.dtype for p in self.backbone.parameters() if p.is_floating_point())
        return next(dtypes, torch.get_default_dtype())

    def _those_with(self, names: tuple[str, ...]) -> list[tuple[nn.Module, str]]:
        """The outermost modules of the backbone that have one of these methods, and the first such."""
        found = list(_outermost(self.backbone, names))
        if not found:
            raise AttributeError(
                f"the backbone {type(self.backbone).__name__} has none of the methods {', '.join(names)}, and neither "
                "has a part of it: what they do has to be done in its own code"
            )
        return found


def _outermost(module: nn.Module, names: tuple[str, ...]) -> Iterator[tuple[nn.Module, str]]:
    name = next((name for name in names if callable(getattr(module, name, None))), None)
    if name is not None:
        yield module, name
        return
    for child in module.children():
        yield from _outermost(child, names)
