"""A pretrained transformer under PEFT's LoRA, expanded where its tasks conflict: ``python examples/lora.py``.

The backbone's own weights stay as they are; its low-rank adapters, what ``expand`` adds, and the heads train. LoRA may
come before ``expand`` or after it; after it, ``dtme.unfreeze`` lets what was added train again. In the end the adapters
are merged, and the model is one without PEFT.
"""

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

import dtme

TASKS = ("brightness", "edges")
LOSSES = dict.fromkeys(TASKS, F.mse_loss)


def backbone() -> nn.Module:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    return ViTModel(ViTConfig(**size, image_size=32, patch_size=8), add_pooling_layer=False)


def batches(count: int) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Images of stripes; for every patch its mean, and how much neighbouring columns differ."""
    made = []
    for i in range(count):
        generator = torch.Generator().manual_seed(i)
        images = torch.randn(8, 3, 32, 1, generator=generator) + torch.randn(8, 3, 1, 32, generator=generator)
        patches = images.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(1, 2)
        brightness = patches.mean((2, 3, 4))[..., None]
        edges = patches.diff(dim=-1).abs().mean((2, 3, 4))[..., None]
        made.append((images, dict(zip(TASKS, (brightness, edges), strict=True))))
    return made


def patches_of(net: nn.Module, images: Tensor) -> Tensor:
    return net(images).last_hidden_state[:, 1:]


def train(model: dtme.MultiTaskModel, data: list[tuple[Tensor, dict[str, Tensor]]]) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameter_groups(lr=1e-2))
    losses = []
    for images, targets in data:
        loss = torch.stack([LOSSES[task](found, targets[task]) for task, found in model(images).items()]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    wrapped = get_peft_model(backbone(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))  # type: ignore[arg-type]
    model = dtme.MultiTaskModel(wrapped, {task: nn.Linear(32, 1) for task in TASKS}, patches_of)
    train(model, batches(5))
    report = dtme.analyze(model, batches(4), LOSSES, progress=False)
    print(report)
    dtme.expand(model, report.plan(num_tokens=4))
    model.print_trainable_parameters()
    losses = train(model.train(), batches(40))
    print(f"loss {losses[0]:.3f}, {losses[-1]:.3f} at the end")
    images = batches(1)[0][0]
    want = model.eval()(images)
    model.backbone = wrapped.merge_and_unload()
    for task, found in model(images).items():
        torch.testing.assert_close(found, want[task], rtol=1e-3, atol=1e-4)
    print("merged: the same predictions")


if __name__ == "__main__":
    main()
