"""``nn.TransformerEncoder`` packs padded batches into nested tensors, which blocks with anything hung on them cannot take."""

from torch import nn

ATTRIBUTES = ("enable_nested_tensor", "use_nested_tensor")


def switch_off(model: nn.Module) -> list[tuple[nn.Module, str, bool]]:
    """Let every encoder in ``model`` keep padded batches as they are; what ``switch_back`` takes."""
    encoders = [module for module in model.modules() if isinstance(module, nn.TransformerEncoder)]
    before = [(encoder, name, getattr(encoder, name)) for encoder in encoders for name in ATTRIBUTES]
    before = [(encoder, name, value) for encoder, name, value in before if value]
    for encoder, name, _ in before:
        setattr(encoder, name, False)
    return before


def switch_back(before: list[tuple[nn.Module, str, bool]]) -> None:
    for encoder, name, value in before:
        setattr(encoder, name, value)
