"""One task of a ``MultiTaskModel`` as a module of its own, and the features that any model's heads read."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from .sharded import entrance

Features = Callable[[nn.Module, Any], Any]


class TaskModel(nn.Module):
    """One task of a ``MultiTaskModel``; takes what its backbone takes and returns the prediction."""

    def __init__(
        self, backbone: nn.Module, features: str | Features, decoder: Any, head: nn.Module | None, task: str
    ) -> None:
        super().__init__()
        self.task = task
        self.backbone, self.features, self.decoder, self.head = backbone, features, decoder, head

    def forward(self, x: Any) -> Any:
        found = features_of(self.backbone, self.features, x)
        if self.decoder is not None:
            found = self.decoder({self.task: found})[self.task]
        return found if self.head is None else self.head(found)


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
