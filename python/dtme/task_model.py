"""One task of a ``MultiTaskModel`` as a module of its own, and the features that any model's heads read."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from .sharded import entrance

Features = Callable[[nn.Module, Any], Any]


class TaskModel(nn.Module):
    """One task of a ``MultiTaskModel``; takes what its backbone takes and returns the prediction.

    It keeps nothing of a call, so that threads may share it. All that is trained in it goes on training, but for task
    keys and values, which are constants made of the weights of the moment it was exported; and a batch norm that
    modulated is the affine map of its statistics then. So train the model, and export anew.
    """

    def __init__(
        self, backbone: nn.Module, features: str | Features, decoder: Any, head: nn.Module | None, task: str
    ) -> None:
        super().__init__()
        self.task = task
        self.backbone, self.features, self.decoder, self.head = backbone, features, decoder, head
        vars(self)["forward"] = _Forward(self)

    def forward(self, x: Any = None, **inputs: Any) -> Any:
        """Predict from ``x``, or from ``inputs`` by the names that the backbone gives them."""
        if x is not None and inputs:
            raise given_beside(inputs)
        x = inputs if x is None else x
        found = features_of(self.backbone, self.features, x)
        if self.decoder is not None:
            found = self.decoder({self.task: found})[self.task]
        return found if self.head is None else self.head(found)


class _Forward:
    """Stands in for a ``TaskModel``'s forward and says what its backbone's inputs are called.

    ``torch.export`` asks for that: where inputs come by names that a signature does not have, it knows no dynamic
    shapes (torch 2.13), and neither does ONNX.
    """

    def __init__(self, module: TaskModel) -> None:
        self.module = (module,)
        x, inputs = list(inspect.signature(type(module).forward).parameters.values())[1:]
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        own = inspect.signature(module.backbone.forward).parameters.values()
        names = [one.name for one in own if one.kind in kinds and one.name not in (x.name, inputs.name)]
        # without annotations, which may not be picklable
        named = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names]
        self.__signature__ = inspect.Signature(
            [x.replace(annotation=x.empty), *named, inputs.replace(annotation=x.empty)]
        )

    @property
    def __code__(self) -> Any:  # which torch.export asks for, to say where a forward is defined
        return type(self.module[0]).forward.__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.module[0]).forward(self.module[0], *args, **kwargs)


def features_of(backbone: nn.Module, features: str | Features, x: Any) -> Any:
    """What the heads take, by a ``MultiTaskModel``'s ``features``."""
    if callable(features):
        return features(backbone, x)
    tokens = backbone_tokens(backbone, x)
    return tokens if features == "tokens" else tokens[:, 0]


def backbone_tokens(backbone: nn.Module, x: Any) -> Tensor:
    """All a backbone returns per token, (B, N, p): timm's ``forward_features``, transformers' last hidden state."""
    call = entrance(backbone, "forward_features") if hasattr(backbone, "forward_features") else backbone
    output = call(**x) if isinstance(x, Mapping) else call(x)
    tokens = getattr(output, "last_hidden_state", output)
    if not isinstance(tokens, Tensor) or tokens.ndim < 3:
        got = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(
            f"features='tokens' needs a backbone that returns (B, N, p), {type(backbone).__name__} returned {got}: "
            "give a function, features=lambda backbone, x: backbone(x) for what it returns as it is"
        )
    return tokens


def given_beside(inputs: Mapping[str, Any]) -> TypeError:
    """The error of a call that gives ``inputs`` by name beside ``x``."""
    return TypeError(
        f"a call takes nothing beside x, got {', '.join(map(repr, inputs))} too: what the backbone takes by name goes "
        "without x, or in it, as a mapping"
    )
