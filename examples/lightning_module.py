"""A ``MultiTaskModel`` in Lightning: ``python examples/lightning_module.py [folder]``.

The plan travels in Lightning's own checkpoints: ``load_from_checkpoint`` and ``fit(ckpt_path=...)`` take a model
that was never expanded.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

import dtme

WIDTH, EPOCHS = 32, 6
LOSSES = {"mean": nn.functional.mse_loss, "spread": nn.functional.mse_loss, "sign": nn.functional.cross_entropy}


class Sequences(pl.LightningModule):
    """Sequences of six vectors; three questions about them."""

    def __init__(self, learning_rate: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, dropout=0.1, batch_first=True, norm_first=True)
        encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        heads = {"mean": nn.Linear(WIDTH, 1), "spread": nn.Linear(WIDTH, 1), "sign": nn.Linear(WIDTH, 2)}
        self.model = dtme.MultiTaskModel(encoder, heads, features=lambda net, x: net(x).mean(1))

    def losses(self, batch: Any) -> dict[str, Tensor]:
        x, targets = batch
        predictions = self.model(x)
        return {task: LOSSES[task](predictions[task], targets[task]) for task in LOSSES}

    def training_step(self, batch: Any, index: int) -> Tensor:
        losses = self.losses(batch)
        self.log_dict(losses, prog_bar=True)
        return torch.stack(list(losses.values())).sum()

    def validation_step(self, batch: Any, index: int) -> None:
        losses = self.losses(batch)
        self.log_dict({f"val_{task}": loss for task, loss in losses.items()})
        self.log("val", torch.stack(list(losses.values())).sum())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # made after the plan is carried out; what expand added is not decayed
        return torch.optim.AdamW(self.model.parameter_groups(lr=self.hparams["learning_rate"], weight_decay=0.01))

    # the plan in the checkpoint: before the weights are loaded, the model gets a place for them
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["expansion"] = dtme.expansion_state(self.model)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        dtme.load_expansion_state(self.model, checkpoint["expansion"])


def make_loader(count: int, seed: int) -> DataLoader[Any]:
    random = torch.Generator().manual_seed(seed)
    spread = torch.rand(count, 1, generator=random) + 0.5
    x = torch.randn(count, 6, WIDTH, generator=random) * spread[..., None]
    targets = {"mean": 3 * x[..., :8].mean((1, 2))[:, None], "spread": spread, "sign": (x[..., 8].mean(1) > 0).long()}
    samples = [(x[i], {task: target[i] for task, target in targets.items()}) for i in range(count)]
    return DataLoader(samples, batch_size=16)  # type: ignore[arg-type]


def fit(module: Sequences, folder: Path, epochs: int, checkpoint: str | None = None) -> str:
    """Where the last checkpoint is."""
    saving = ModelCheckpoint(folder)  # after every epoch
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0, "accelerator": "cpu", **quiet}
    trainer = pl.Trainer(max_epochs=epochs, callbacks=[saving], **options)
    trainer.fit(module, make_loader(256, seed=1), make_loader(64, seed=2), ckpt_path=checkpoint)
    values = {name: f"{value:.3f}" for name, value in trainer.callback_metrics.items() if "val" in name}
    print(f"after {trainer.current_epoch} epochs: {values}")
    return saving.best_model_path


def main(folder: Path) -> None:
    pl.seed_everything(0, verbose=False)
    module = Sequences()
    report = dtme.analyze(module.model, make_loader(256, seed=1), LOSSES, max_batches=8, progress=False)
    print(report)
    dtme.expand(module.model, report.plan(num_tokens=2))  # before fit, which makes the optimizer
    module.model.print_trainable_parameters()
    last = fit(module, folder, EPOCHS // 2)

    loaded = Sequences.load_from_checkpoint(last)  # plain when it is made
    x, _ = next(iter(make_loader(16, seed=3)))
    found, want = loaded.model.eval()(x), module.model.eval()(x)
    same = all(torch.equal(found[task], want[task]) for task in LOSSES)
    print(f"loaded: {'the same predictions' if same else 'other predictions'}")

    fit(Sequences(), folder / "resumed", EPOCHS, last)  # a plain one goes on, too


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with TemporaryDirectory() as folder:
            main(Path(folder))
