"""``nn.TransformerEncoder`` packs padded batches into nested tensors, which blocks with hooks cannot take."""

from torch import nn

ATTRIBUTES = ("enable_nested_tensor", "use_nested_tensor")


def switch_off(model: nn.Module) -> list[tuple[nn.Module, str, bool]]:
    """Let every encoder in ``model`` keep padded batches as they are; what ``switch_back`` takes."""
    before: list[tuple[nn.Module, str, bool]] = []
    for encoder in model.modules():
        for name in ATTRIBUTES:
            if isinstance(encoder, nn.TransformerEncoder) and getattr(encoder, name):
                before.append((encoder, name, getattr(encoder, name)))
                setattr(encoder, name, False)
    return before


def switch_back(before: list[tuple[nn.Module, str, bool]]) -> None:
    for encoder, name, value in before:
        setattr(encoder, name, value)
