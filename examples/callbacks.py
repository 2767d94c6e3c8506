"""The conflict monitor in somebody else's training loop: ``python examples/callbacks.py``.

As a callback of transformers' ``Trainer`` and as one of Lightning. Each runs where its library is installed; else a
line says what is missing. ``Trainer`` needs accelerate too: without it the callback is called as ``Trainer`` would, by
transformers' own handler of callbacks.
"""

from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

import dtme

WIDTH, STEPS = 32, 30
LOSSES = {"sum": nn.functional.mse_loss, "product": nn.functional.mse_loss}


def make_model() -> dtme.MultiTaskModel:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    return dtme.MultiTaskModel(encoder, {task: nn.Linear(WIDTH, 1) for task in LOSSES}, lambda net, x: net(x))


def make_samples(count: int = 64) -> list[dict[str, Any]]:
    x = torch.randn(count, 6, WIDTH, generator=torch.Generator().manual_seed(1))
    return [
        {"x": one, "targets": {"sum": one.mean(-1, keepdim=True), "product": one[:, :1] * one[:, 1:2]}} for one in x
    ]


def total_loss(predictions: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
    return torch.stack([LOSSES[task](predictions[task], targets[task]) for task in LOSSES]).sum()


# --- transformers -----------------------------------------------------------------------------------------------------


class WithLoss(nn.Module):
    """What ``Trainer`` wants: a module that returns its loss."""

    def __init__(self, model: dtme.MultiTaskModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, targets: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": total_loss(self.model(x), targets)}


def transformers_callback(monitor: dtme.ConflictMonitor) -> Any:
    from transformers import TrainerCallback

    class MonitorCallback(TrainerCallback):
        """A step's callback is not told the batch: a hook sees it on its way into the model."""

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
            self.handle = model.register_forward_pre_hook(self.see, with_kwargs=True)

        def see(self, module: nn.Module, args: Any, inputs: dict[str, Any]) -> None:
            self.batch = inputs["x"], inputs["targets"]

        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            monitor.step(self.batch)

        def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            self.handle.remove()

    return MonitorCallback()


def with_transformers() -> None:
    if find_spec("transformers") is None:
        print("transformers is not installed: its callback was not run")
        return
    model = WithLoss(make_model())
    monitor = dtme.ConflictMonitor(model.model, LOSSES, every=10)
    run = train_with_trainer if find_spec("accelerate") is not None else train_with_handler
    run(model, transformers_callback(monitor))
    print(monitor)


def train_with_trainer(model: nn.Module, callback: Any) -> None:
    from torch.utils.data import default_collate
    from transformers import Trainer, TrainingArguments

    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=STEPS, per_device_train_batch_size=8, report_to=[], save_strategy="no", use_cpu=True
        )
        # Trainer's own collator cannot take nested targets
        data = {"train_dataset": make_samples(), "data_collator": default_collate}
        Trainer(model, arguments, callbacks=[callback], **data).train()
    print("transformers: trained by Trainer")


def train_with_handler(model: nn.Module, callback: Any) -> None:
    """The order in which ``Trainer`` calls a callback."""
    from torch.utils.data import DataLoader
    from transformers import logging
    from transformers.trainer_callback import CallbackHandler, TrainerControl, TrainerState

    logging.set_verbosity_error()  # it would rather have Trainer's other callbacks, too
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    handler = CallbackHandler([callback], model, None, optimizer, None)
    state, control = TrainerState(), TrainerControl()
    handler.on_train_begin(None, state, control)
    loader = DataLoader(make_samples(), batch_size=8)
    while state.global_step < STEPS:
        for inputs in loader:
            handler.on_step_begin(None, state, control)
            model(**inputs)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            state.global_step += 1
            handler.on_step_end(None, state, control)
            if state.global_step == STEPS:
                break
    handler.on_train_end(None, state, control)
    print("transformers: accelerate is not installed, so not trained by Trainer but by a loop with its callbacks")


# --- Lightning --------------------------------------------------------------------------------------------------------


def with_lightning() -> None:
    if find_spec("lightning") is None:
        print("lightning is not installed: its callback was not run")
        return
    import lightning.pytorch as pl
    from torch.utils.data import DataLoader

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = make_model()

        def training_step(self, batch: Any, index: int) -> Tensor:
            x, targets = batch
            return total_loss(self.model(x), targets)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.model.parameter_groups(lr=1e-3))

    class MonitorCallback(pl.Callback):
        """A monitor may write to the logger: ``writer=trainer.logger.experiment`` if that is TensorBoard's."""

        def on_fit_start(self, trainer: Any, module: Any) -> None:
            self.monitor = dtme.ConflictMonitor(module.model, LOSSES, every=10)

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            self.monitor.step(batch)

    samples = [(sample["x"], sample["targets"]) for sample in make_samples()]
    callback = MonitorCallback()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_steps=STEPS, accelerator="cpu", callbacks=[callback], **quiet)
    trainer.fit(Module(), DataLoader(samples, batch_size=8))
    print("lightning: trained by its Trainer")
    print(callback.monitor)


if __name__ == "__main__":
    with_transformers()
    with_lightning()
