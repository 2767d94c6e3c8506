"""Quantised weights, by torchao and bitsandbytes."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import dtme

from .situation import difference, largest, situation
from .small import TASKS, added_of, heads, images, move, plan_of, predict, vit

NEEDS, TASK = ("transformers", "torchao"), TASKS[1]
Quantise = Callable[[nn.Module], None]
WIDTH = 64  # what four bits are packed for


def weights(module: nn.Module) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(module, Int8WeightOnlyConfig())


def activations(module: nn.Module) -> None:
    """Those too, as they come, token by token."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(module, Int8DynamicActivationInt8WeightConfig())


def bits(number: int) -> Quantise:
    """bitsandbytes' linear layers in the place of torch's."""
    import bitsandbytes as bnb

    def made_of(linear: nn.Linear) -> nn.Module:
        size = linear.in_features, linear.out_features
        weight, given = linear.weight.data.clone(), {"requires_grad": False}
        new: nn.Module
        if number == 8:
            new = bnb.nn.Linear8bitLt(*size, has_fp16_weights=False)
            new.weight = bnb.nn.Int8Params(weight, has_fp16_weights=False, **given)
        else:
            new = bnb.nn.Linear4bit(*size, compute_dtype=torch.float32, quant_type="nf4")
            new.weight = bnb.nn.Params4bit(weight, quant_type="nf4", **given)
        new.bias = linear.bias
        return new.to("cpu")

    def quantise(module: nn.Module) -> None:
        for parent in list(module.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    setattr(parent, name, made_of(child))

    return quantise


def base(quantise: Quantise) -> nn.Module:
    backbone = vit(dtype=torch.float32, width=WIDTH)
    quantise(backbone)
    return backbone.eval()


def some_heads() -> dict[str, nn.Module]:
    return heads(torch.float32, WIDTH)


def quantised_first(quantise: Quantise) -> dtme.MultiTaskModel:
    model = dtme.MultiTaskModel(base(quantise), some_heads()).eval()
    dtme.expand(model, plan_of(model.backbone))
    move(model, ".dtme.")
    return model


def expanded_first(quantise: Quantise) -> dtme.MultiTaskModel:
    model = dtme.MultiTaskModel(vit(dtype=torch.float32, width=WIDTH), some_heads()).eval()
    dtme.expand(model, plan_of(model.backbone))
    move(model, ".dtme.")
    quantise(model.backbone)
    return model.eval()


def off(quantise: Quantise) -> float:
    """Predictions before and after, and those of an exported task, against the quantised backbone by plain hooks."""
    x, worst = images(3, torch.float32), 0.0
    for make in (quantised_first, expanded_first):
        model = make(quantise)
        added = added_of(model.backbone)
        assert all(type(one) is nn.Parameter and one.dtype == torch.float32 for one in added.values())
        with torch.no_grad():
            want = predict(base(quantise), some_heads(), added, x)
            single = model.export_task(TASK, plain=True)
            worst = max(worst, largest(model(x), want), difference(single(x), want[TASK]))
    return worst


@situation(
    "torchao", "int8 weights, before expand and after, exported task", against="quantised, plain hooks", limit=1e-5,
    needs=NEEDS,
)  # fmt: skip
def int8_weights() -> float:
    return off(weights)


@situation(
    "torchao", "int8 weights and activations, before expand and after", against="quantised, plain hooks", limit=1e-2,
    needs=NEEDS,
)  # fmt: skip
def int8_activations() -> float:
    """Rounding moves an activation over a step now and then: such is the limit."""
    return off(activations)


@situation("torchao", "torch.export of a task of int8 weights", against="model(x, tasks)", limit=1e-5, needs=NEEDS)
def exported() -> float:
    model = quantised_first(weights)
    with torch.no_grad():
        shapes = ({0: torch.export.Dim.DYNAMIC},)
        single = model.export_task(TASK, plain=True)
        program = torch.export.export(single, (images(3, torch.float32),), dynamic_shapes=shapes).module()
        inputs = [images(rows, torch.float32) for rows in (1, 5)]
        return max(difference(program(x), model(x, TASK)[TASK]) for x in inputs)


def gradients_off(quantise: Quantise) -> float:
    """Of what was added and the heads, in training mode."""
    model, x, plain_heads = quantised_first(quantise).train(), images(3, torch.float32), nn.ModuleDict(some_heads())
    for name, parameter in model.backbone.named_parameters():
        parameter.requires_grad_(".dtme." in name)
    own, plain = added_of(model.backbone), base(quantise).train()
    added = {name: one.detach().clone().requires_grad_() for name, one in own.items()}

    def loss(predictions: dict[str, Tensor]) -> Tensor:
        return torch.stack([one.square().mean() for one in predictions.values()]).sum()

    loss(model(x)).backward()
    loss(predict(plain, plain_heads, added, x)).backward()
    found = {**own, **dict(model.heads.named_parameters())}
    want = {**added, **dict(plain_heads.named_parameters())}
    return largest(*({name: one.grad for name, one in some.items()} for some in (found, want)))  # type: ignore[arg-type]


@situation(
    "torchao", "gradients over int8 weights", against="a loop over tasks by plain hooks", limit=1e-5, needs=NEEDS
)
def gradients() -> float:
    return gradients_off(weights)


@situation(
    "bitsandbytes", "4 bits (NF4), before expand and after, exported task", against="quantised, plain hooks",
    limit=1e-2, needs=("transformers", "bitsandbytes"),
)  # fmt: skip
def four_bits() -> float:
    """In evaluation mode, after which bitsandbytes cannot train on some processors, with or without this package."""
    return off(bits(4))


@situation(
    "bitsandbytes", "8 bits, before expand and after, exported task", against="quantised, plain hooks", limit=1e-2,
    needs=("transformers", "bitsandbytes"),
)  # fmt: skip
def eight_bits() -> float:
    """Activations are rounded to eight bits too."""
    return off(bits(8))


@situation(
    "bitsandbytes", "gradients over 8 bits", against="a loop over tasks by plain hooks", limit=1e-5,
    needs=("transformers", "bitsandbytes"),
)  # fmt: skip
def gradients_over_eight_bits() -> float:
    return gradients_off(bits(8))
