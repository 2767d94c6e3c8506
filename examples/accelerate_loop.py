"""A training loop with Accelerate: ``python examples/accelerate_loop.py [folder]``.

Batches have labels of some tasks only, and only those tasks run. Gradients are accumulated and clipped; the state that
is saved half way is a saved model too.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

import dtme

WIDTH, STEPS = 32, 80
LOSSES = {"mean": nn.functional.mse_loss, "spread": nn.functional.mse_loss, "sign": nn.functional.cross_entropy}
Batch = tuple[Tensor, dict[str, Tensor]]


def make_parts() -> tuple[nn.Module, dict[str, nn.Module]]:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
    heads = {"mean": nn.Linear(WIDTH, 1), "spread": nn.Linear(WIDTH, 1), "sign": nn.Linear(WIDTH, 2)}
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), heads


def pooled(net: nn.Module, x: Tensor) -> Tensor:
    return net(x).mean(1)


def make_batches(count: int, tasks_of: list[list[str]]) -> list[Batch]:
    """Batch i has labels of the tasks ``tasks_of[i % len(tasks_of)]``."""
    random = torch.Generator().manual_seed(1)
    batches = []
    for i in range(count):
        spread = torch.rand(16, 1, generator=random) + 0.5
        x = torch.randn(16, 6, WIDTH, generator=random) * spread[..., None]
        sign = (x[..., 8].mean(1) > 0).long()
        targets = {"mean": 3 * x[..., :8].mean((1, 2))[:, None], "spread": spread, "sign": sign}
        batches.append((x, {task: targets[task] for task in tasks_of[i % len(tasks_of)]}))
    return batches


def train(folder: Path, model: dtme.MultiTaskModel, batches: list[Batch], resume: bool = False) -> dtme.MultiTaskModel:
    """Half way the state is saved in ``folder``; or what was saved there goes on from there."""
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
    # made after the plan is carried out, and before prepare; what expand added is not decayed
    optimizer = torch.optim.AdamW(model.parameter_groups(lr=3e-3, weight_decay=0.01))
    loader = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    sums: dict[str, list[float]] = {}
    for step, (x, targets) in enumerate(loader):
        if step < len(batches) // 2 and resume:
            continue
        if step == len(batches) // 2:
            if resume:
                accelerator.load_state(folder)
            else:
                accelerator.save_state(folder)
                accelerator.unwrap_model(prepared).save_pretrained(folder)  # the plan beside the state, in its folder
        with accelerator.accumulate(prepared):
            predictions = prepared(x, list(targets))
            losses = {task: LOSSES[task](predictions[task], targets[task]) for task in targets}
            accelerator.backward(torch.stack(list(losses.values())).sum())
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        for task, loss in losses.items():
            sums.setdefault(task, []).append(loss.item())
    print(", ".join(f"{task} {said(values)}" for task, values in sums.items()))
    return accelerator.unwrap_model(prepared)


def said(values: list[float]) -> str:
    first, last = (sum(part) / len(part) for part in (values[:8], values[-8:]))
    return f"{first:.3f} to {last:.3f} in {len(values)} batches"


def main(folder: Path) -> None:
    model = dtme.MultiTaskModel(*make_parts(), features=pooled)
    report = dtme.analyze(model, make_batches(8, [list(LOSSES)]), LOSSES, progress=False)
    print(report)
    dtme.expand(model, report.plan(num_tokens=2))
    batches = make_batches(2 * STEPS, [["mean", "spread"], ["sign"], ["spread", "sign"]])
    train(folder, model, batches)

    again = dtme.MultiTaskModel.from_pretrained(folder, *make_parts(), features=pooled)
    train(folder, again, batches, resume=True)
    pairs = zip(model.parameters(), again.parameters(), strict=True)
    print("resumed half way: " + ("the same weights" if all(torch.equal(a, b) for a, b in pairs) else "other weights"))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with TemporaryDirectory() as folder:
            main(Path(folder))
