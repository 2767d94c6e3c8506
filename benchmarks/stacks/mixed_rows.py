"""Rows of one batch that have different tasks."""

import copy

import torch
from torch import Tensor, nn

import dtme
from dtme.blocks import find_blocks

from .situation import difference, largest, situation

TASKS = ("semseg", "depth", "normals")
ROWS = ("depth", "semseg", "semseg", "normals", "depth")
WIDTH = 24
STACK, AGAINST = "rows of their own", "each task's rows by themselves"


def expanded(backbone: nn.Module, **options: object) -> dtme.MultiTaskModel:
    """In float64; streams part at different blocks, and not every task has every module."""
    torch.manual_seed(0)
    model = dtme.MultiTaskModel(backbone, {task: nn.Linear(WIDTH, 2) for task in TASKS}).double().eval()
    first, *_, last = find_blocks(backbone)
    dtme.expand(model, dtme.ExpansionPlan(TASKS, 2, {first: TASKS[:2], last: TASKS}, {last: TASKS[1:]}), **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def rows_of(task: str) -> list[int]:
    return [i for i, own in enumerate(ROWS) if own == task]


def alone(model: dtme.MultiTaskModel, x: Tensor) -> dict[str, Tensor]:
    return {task: model(x[rows_of(task)], task)[task] for task in TASKS}


def gradients(model: dtme.MultiTaskModel, predictions: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    sum((i + 1) * p.square().sum() for i, p in enumerate(predictions.values())).backward()  # type: ignore[union-attr]
    # what several weights add up to nothing in, as biases of keys do, is left to rounding
    scale = max(p.grad.abs().max() for p in model.parameters() if p.grad is not None)
    return {"all": torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]) / scale}


def off(model: dtme.MultiTaskModel, x: Tensor) -> float:
    """How far predictions and gradients of one pass are from those of every task by itself."""
    found, want = model(x, task_of_row=ROWS), alone(model, x)
    return max(largest(found, want), largest(gradients(model, found), gradients(model, want)))


def vit() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(img_size=16, patch_size=8, embed_dim=WIDTH, depth=3, num_heads=3, num_classes=0)


@situation(
    "rows of their own",
    "a timm ViT, predictions and gradients in one pass",
    against=AGAINST,
    limit=1e-12,
    needs=("timm",),
)
def timm_vit() -> float:
    return off(expanded(vit()), torch.randn(5, 3, 16, 16).double())


@situation(STACK, "windows of a timm Swin v2", against=AGAINST, limit=1e-12, needs=("timm",))
def windows() -> float:
    from timm.models.swin_transformer_v2 import SwinTransformerV2

    backbone = SwinTransformerV2(
        img_size=24, patch_size=2, embed_dim=WIDTH, depths=(2,), num_heads=(3,), window_size=4, num_classes=0
    )
    return off(expanded(backbone), torch.randn(5, 3, 24, 24).double())


@situation(
    "rows of their own",
    "batch-norm modulators and their statistics in training",
    against=AGAINST,
    limit=1e-12,
    needs=("timm",),
)
def statistics() -> float:
    model, x = expanded(vit(), modulator="batch_norm").train(), torch.randn(5, 3, 16, 16).double()
    twin = copy.deepcopy(model)
    predictions = largest(model(x, task_of_row=ROWS), alone(twin, x))
    return max(predictions, largest(dict(model.named_buffers()), dict(twin.named_buffers())))


@situation(
    "rows of their own",
    "checkpointed blocks, gradients",
    against="the same without checkpoints",
    limit=1e-13,
    needs=("timm",),
)
def checkpointed() -> float:
    model, x = expanded(vit()), torch.randn(5, 3, 16, 16).double()
    want = gradients(model, model(x, task_of_row=ROWS))
    model.backbone.set_grad_checkpointing(True)
    return difference(gradients(model, model(x, task_of_row=ROWS))["all"], want["all"])


@situation(STACK, "text: caches, beams, padding", against=AGAINST, limit=1e-10, needs=("transformers",))
def text() -> float:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**small, intermediate_size=48, vocab_size=50, pad_token_id=0, eos_token_id=None)
    llama = LlamaForCausalLM(config).double().eval()
    blocks = {"model.layers.0": TASKS, "model.layers.2": TASKS[:1]}
    dtme.expand(llama, dtme.ExpansionPlan(TASKS, 3, {"model.layers.1": TASKS}, blocks))
    for parameter in llama.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    prompt, mask = torch.randint(1, 50, (len(ROWS), 6)), torch.ones(len(ROWS), 6, dtype=torch.long)
    mask[1, :2] = 0
    worst = 0.0
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 3}):
        more = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        more |= options
        of_beams = [task for task in ROWS for _ in range(options.get("num_beams", 1))]
        with dtme.tasks(llama, task_of_row=of_beams):
            found = llama.generate(prompt, attention_mask=mask, **more)
        for i, task in enumerate(ROWS):
            with dtme.tasks(llama, task):
                want = llama.generate(prompt[i : i + 1], attention_mask=mask[i : i + 1], **more)
            same = torch.equal(found.sequences[i], want.sequences[0])
            worst = max(worst, 0.0 if same else 1.0)
            if "num_beams" not in options:
                pairs = zip(found.logits, want.logits, strict=True)
                worst = max(worst, *[difference(rows[i], row[0]) for rows, row in pairs])
    return worst
