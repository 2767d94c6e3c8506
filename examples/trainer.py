"""transformers' ``Trainer`` on several tasks: ``python examples/trainer.py [folder]``.

A small ViT looks at pictures of one bright square, and is to tell where it is, its colour, and whether it is large. It
is analysed and expanded, then trained by ``MultiTaskTrainer``: labels in, losses out, every checkpoint a saved model.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import EvalPrediction, TrainingArguments, ViTConfig, ViTModel

import dtme
from dtme.trainer import MultiTaskTrainer

WIDTH, STEPS = 32, 60
LOSSES = {"place": nn.functional.mse_loss, "colour": nn.functional.mse_loss, "size": nn.functional.cross_entropy}


def make_parts() -> tuple[nn.Module, dict[str, nn.Module]]:
    """A backbone and a head for each task, as they were before any training."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=16, patch_size=4, hidden_size=WIDTH, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64
    )
    heads = {"place": nn.Linear(WIDTH, 2), "colour": nn.Linear(WIDTH, 3), "size": nn.Linear(WIDTH, 2)}
    return ViTModel(config, add_pooling_layer=False), heads


def make_samples(count: int, seed: int) -> list[dict[str, Any]]:
    """What ``Trainer`` takes: what the backbone takes, by name, and the labels of each task."""
    random = torch.Generator().manual_seed(seed)
    return [make_sample(random) for _ in range(count)]


def make_sample(random: torch.Generator) -> dict[str, Any]:
    picture = 0.1 * torch.randn(3, 16, 16, generator=random)
    colour, is_large = torch.rand(3, generator=random), torch.randint(2, (), generator=random)
    side = 4 + 3 * int(is_large)
    top, left = torch.randint(0, 16 - side, (2,), generator=random).tolist()
    picture[:, top : top + side, left : left + side] += colour[:, None, None]
    place = torch.tensor([top, left]) / 16
    return {"pixel_values": picture, "labels": {"place": place, "colour": colour, "size": is_large}}


def expand_where_it_conflicts(model: dtme.MultiTaskModel, samples: list[dict[str, Any]]) -> None:
    """``analyze`` reads (inputs, {task: target}); the rest is as ever."""

    def collate(some: list[dict[str, Any]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        x = {"pixel_values": torch.stack([sample["pixel_values"] for sample in some])}
        return x, {task: torch.stack([sample["labels"][task] for sample in some]) for task in LOSSES}

    loader = DataLoader(samples, batch_size=16, collate_fn=collate)  # type: ignore[arg-type]
    report = dtme.analyze(model, loader, LOSSES, max_batches=4, progress=False)
    print(report)
    dtme.expand(model, report.plan(num_tokens=2))
    model.print_trainable_parameters()


def metrics(seen: EvalPrediction) -> dict[str, float]:
    """Predictions and labels are ``{task: array}``."""
    found, want = seen.predictions, seen.label_ids
    return {
        "place_error": float(abs(found["place"] - want["place"]).mean()),
        "size_accuracy": float((found["size"].argmax(-1) == want["size"]).mean()),
    }


def arguments(folder: Path) -> TrainingArguments:
    return TrainingArguments(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=16,
        learning_rate=3e-3,
        weight_decay=0.01,  # of what expand added, nothing is decayed
        activation_checkpointing=True,
        save_strategy="steps",
        save_steps=STEPS // 2,
        eval_strategy="steps",
        eval_steps=STEPS // 2,
        logging_steps=STEPS // 4,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )


def main(folder: Path) -> None:
    train, held_out = make_samples(256, seed=1), make_samples(64, seed=2)
    model = dtme.MultiTaskModel(*make_parts(), features="cls")
    expand_where_it_conflicts(model, train)
    options: dict[str, Any] = {"losses": LOSSES, "loss_weights": {"size": 0.5}, "train_dataset": train}
    options |= {"eval_dataset": held_out, "compute_metrics": metrics}
    trainer = MultiTaskTrainer(model, arguments(folder), **options)
    trainer.train()

    # a checkpoint's folder is a saved model: it needs the plain parts, and knows the plan itself
    half_way = folder / f"checkpoint-{STEPS // 2}"
    again = dtme.MultiTaskModel.from_pretrained(half_way, *make_parts())
    resumed = MultiTaskTrainer(again, arguments(folder / "resumed"), **options)
    resumed.train(resume_from_checkpoint=str(half_way))
    pairs = zip(model.parameters(), again.parameters(), strict=True)
    print("resumed half way: " + ("the same weights" if all(torch.equal(a, b) for a, b in pairs) else "other weights"))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with TemporaryDirectory() as folder:
            main(Path(folder))
