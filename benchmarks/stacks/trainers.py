"""Loops that a library owns: transformers' Trainer, Lightning, Accelerate."""

import contextlib
import io
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

import dtme

from . import loops
from .loops import LOSSES, Batch
from .situation import difference, largest, situation

STEPS, ROWS = 6, 4
TRAINER, LIGHTNING, ACCELERATE = "transformers Trainer", "Lightning", "Accelerate"


@contextlib.contextmanager
def _quietly() -> Iterator[Path]:
    """A folder that goes away again; libraries say nothing."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        printed = contextlib.redirect_stdout(io.StringIO())
        with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder, printed:
            warnings.simplefilter("ignore")
            yield Path(folder)
    finally:
        logging.disable(before)
        _forget_accelerators()


def _equal_bits(found: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """0.0 where every bit is the same."""
    same = found.keys() == want.keys() and all(torch.equal(found[name], want[name]) for name in want)
    return 0.0 if same else float("inf")


# --- transformers' Trainer --------------------------------------------------------------------------------------------


class _Recorder:
    """A collator that remembers its batches: those that a plain loop has to be given."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []

    def __call__(self, samples: list[Batch]) -> Batch:
        self.batches.append(default_collate(samples))
        return dict(self.batches[-1])


def trainer(folder: Path, model: nn.Module, *, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    from transformers import TrainingArguments

    from dtme.trainer import MultiTaskTrainer

    given = {name: options.pop(name) for name in list(options) if name in ("data_collator", "eval_dataset")}
    arguments: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": ROWS,
        "learning_rate": loops.LEARNING_RATE,
        "weight_decay": loops.DECAY,
        "adam_epsilon": loops.EPS,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    data = loops.samples(2 * STEPS * ROWS - 2, dtype=dtype)  # the last batch is a smaller one
    return MultiTaskTrainer(
        model, TrainingArguments(str(folder), **arguments | options), losses=LOSSES, train_dataset=data, **given
    )


def _by_trainer(model: nn.Module, **options: Any) -> tuple[dict[str, Tensor], list[Batch]]:
    """The weights that it ends with, and the batches that it took."""
    recorder = _Recorder()
    with _quietly() as folder:
        trainer(folder, model, data_collator=recorder, **options).train()
    return loops.weights(model), recorder.batches


def _as_trainer_groups(model: dtme.MultiTaskModel) -> torch.optim.Optimizer:
    """AdamW as Trainer makes it: biases and norms are not decayed, and neither must be what ``expand`` added."""
    decays = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and ".dtme." not in name
    }
    decays |= {name for name, _ in model.named_parameters() if "embeddings." in name and "bias" not in name}
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for name, p in named.items() if (name in decays) is decay], "weight_decay": loops.DECAY * decay}
        for decay in (True, False)
    ]
    return torch.optim.AdamW(groups, lr=loops.LEARNING_RATE, eps=loops.EPS)


NEEDED = ("transformers", "accelerate")


@situation(TRAINER, "a run with its own AdamW and clipping", against="a plain loop", limit=1e-12, needs=NEEDED)
def trainer_run() -> float:
    found, batches = _by_trainer(loops.expanded_model(), max_grad_norm=0.5)
    plain = loops.expanded_model()
    loops.train(plain, loops.in_steps(batches[:STEPS], 1), clip=0.5, optimizer=_as_trainer_groups(plain))
    return largest(found, loops.weights(plain))


@situation(
    TRAINER, "two batches accumulated, activations recomputed", against="a plain loop", limit=1e-12, needs=NEEDED
)
def trainer_accumulation() -> float:
    options = {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    found, batches = _by_trainer(loops.expanded_model(), **options)
    plain = loops.expanded_model()
    loops.train(plain, loops.in_steps(batches[: 2 * STEPS], 2), optimizer=_as_trainer_groups(plain))
    return largest(found, loops.weights(plain)) if len(batches[2 * STEPS - 1]["pixel_values"]) == 2 else float("inf")


@situation(TRAINER, "bfloat16 by autocast", against="a plain loop under autocast", limit=1e-6, needs=NEEDED)
def trainer_autocast() -> float:
    def context() -> Any:
        return torch.autocast("cpu", torch.bfloat16)

    def with_all_tasks(model: dtme.MultiTaskModel, batches: list[Batch]) -> None:
        # rounding to bfloat16 is not the same for one task alone: there, the loop takes all of them at once, too
        optimizer = _as_trainer_groups(model)
        for batch in batches:
            optimizer.zero_grad()
            with context():
                found = model(batch["pixel_values"])
                losses = [LOSSES[task](found[task].float(), batch["labels"][task]) for task in loops.TASKS]
            torch.stack(losses).sum().backward()
            optimizer.step()

    found, batches = _by_trainer(loops.expanded_model(dtype=torch.float32), bf16=True, dtype=torch.float32)
    plain = loops.expanded_model(dtype=torch.float32).train()
    with_all_tasks(plain, batches[:STEPS])
    return largest(found, loops.weights(plain))


@situation(TRAINER, "compiled", against="a plain loop", limit=1e-12, needs=NEEDED)
def trainer_compiled() -> float:
    found, batches = _by_trainer(loops.expanded_model(), torch_compile=True, torch_compile_backend="eager")
    plain = loops.expanded_model()
    loops.train(plain, loops.in_steps(batches[:STEPS], 1), optimizer=_as_trainer_groups(plain))
    return largest(found, loops.weights(plain))


@situation(TRAINER, "a checkpoint's folder, tied weights and all", against="the same bits", limit=0.0, needs=NEEDED)
def trainer_checkpoint() -> float:
    def tied(model: dtme.MultiTaskModel) -> dtme.MultiTaskModel:
        model.heads["depth"].weight = model.heads["edges"].weight
        return model

    with _quietly() as folder:
        run = trainer(folder, tied(loops.expanded_model()), save_strategy="steps", save_steps=STEPS)
        run.train()
        run.save_model(str(folder / "by hand"))
        want = loops.predictions(run.model)
        worst = 0.0
        for name in (f"checkpoint-{STEPS}", "by hand"):
            fresh = tied(loops.plain_model())
            again = dtme.MultiTaskModel.from_pretrained(folder / name, fresh.backbone, fresh.heads)
            worst = max(worst, _equal_bits(loops.predictions(again), want))
    return worst


@situation(TRAINER, "resumed, with dropout", against="the same bits of a run without a break", limit=0.0, needs=NEEDED)
def trainer_resumed() -> float:
    def model() -> dtme.MultiTaskModel:
        return loops.expanded_model(loops.vit(dropout=0.2))

    with _quietly() as folder:
        options = {"save_strategy": "steps", "save_steps": STEPS // 2, "max_grad_norm": 1.0}
        whole = trainer(folder / "whole", model(), **options)
        whole.train()
        resumed = trainer(folder / "resumed", model(), **options)
        resumed.train(resume_from_checkpoint=str(folder / "whole" / f"checkpoint-{STEPS // 2}"))
        return _equal_bits(loops.weights(resumed.model), loops.weights(whole.model))


@situation(TRAINER, "evaluate and predict", against="a plain loop", limit=1e-12, needs=NEEDED)
def trainer_evaluation() -> float:
    model, data = loops.expanded_model(), loops.samples(11)
    metrics: dict[str, Any] = {}
    with _quietly() as folder:
        run = trainer(folder, model, eval_dataset=data, per_device_eval_batch_size=ROWS)
        run.compute_metrics = lambda seen: metrics.update(seen.label_ids) or {}
        loss, found = run.evaluate()["eval_loss"], run.predict(data).predictions
        unlabelled = run.predict([{"pixel_values": sample["pixel_values"]} for sample in data]).predictions
    batch = default_collate(data)
    with torch.no_grad():
        want = {task: model(batch["pixel_values"], task)[task] for task in loops.TASKS}
        total = torch.stack([LOSSES[task](want[task], batch["labels"][task]) for task in loops.TASKS]).sum()
    pairs = [(found, want), (unlabelled, want), (metrics, batch["labels"])]
    worst = [largest({task: torch.from_numpy(x) for task, x in a.items()}, b) for a, b in pairs]
    rounded = difference(torch.tensor(loss), total)  # Trainer keeps it in float32
    return max(*worst, rounded if rounded > 1e-6 else 0.0)


# --- Lightning --------------------------------------------------------------------------------------------------------


def _lightning_module(model: dtme.MultiTaskModel) -> Any:
    """The recipe of examples/lightning_module.py, around a model that is given."""
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Batch, index: int) -> Tensor:
            found = self.model(batch["pixel_values"])
            return torch.stack([LOSSES[task](found[task], batch["labels"][task]) for task in loops.TASKS]).sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return loops.optimizer_of(self.model)

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["expansion"] = dtme.expansion_state(self.model)

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            dtme.load_expansion_state(self.model, checkpoint["expansion"])

    return Module()


def _loader() -> DataLoader[Any]:
    return DataLoader(loops.samples(2 * STEPS * ROWS - 2), batch_size=ROWS)  # type: ignore[arg-type]


def _fit(module: Any, folder: Path, steps: int, resume: Path | None = None, **options: Any) -> Path:
    """Where the checkpoint of the last step is."""
    import lightning.pytorch as pl

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    loop = pl.Trainer(max_steps=steps, default_root_dir=folder, enable_checkpointing=False, **quiet, **options)
    loop.fit(module, _loader(), ckpt_path=None if resume is None else str(resume))
    loop.save_checkpoint(folder / f"{steps}.ckpt")
    return folder / f"{steps}.ckpt"


@situation(
    LIGHTNING, "accumulation and clipping", against="a plain loop", limit=1e-12, needs=("lightning", "transformers")
)
def lightning_run() -> float:
    model, plain = loops.expanded_model(), loops.expanded_model()
    with _quietly() as folder:
        _fit(_lightning_module(model), folder, STEPS, accumulate_grad_batches=2, gradient_clip_val=0.5)
    loops.train(plain, loops.in_steps(list(_loader()), 2), clip=0.5)
    return largest(loops.weights(model), loops.weights(plain))


@situation(
    LIGHTNING,
    "a checkpoint goes on in a plain model, with dropout",
    against="the same bits of a run without a break",
    limit=0.0,
    needs=("lightning", "transformers"),
)
def lightning_resumed() -> float:
    def backbone() -> nn.Module:
        return loops.vit(dropout=0.2)

    with _quietly() as folder:
        torch.manual_seed(3)
        first = _lightning_module(loops.expanded_model(backbone()))
        second = _lightning_module(loops.plain_model(backbone()))
        middle = _fit(first, folder, STEPS // 2)
        for module in (first, second):
            torch.manual_seed(3)  # Lightning keeps no random state
            _fit(module, folder, STEPS, middle)
        return _equal_bits(loops.weights(second.model), loops.weights(first.model))


# --- Accelerate -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def accelerator(**options: Any) -> Iterator[Any]:
    """An Accelerator that knows nothing of others in this process, nor they of it: its settings are global."""
    from accelerate import Accelerator

    _forget_accelerators()
    try:
        yield Accelerator(cpu=True, **options)
    finally:
        _forget_accelerators()


def _forget_accelerators() -> None:
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        GradientState._reset_state()
        AcceleratorState._reset_state(reset_partial_state=True)


def _accelerated(model: dtme.MultiTaskModel, folder: Path | None = None, resume: bool = False) -> Any:
    """Two batches per step; in the middle the state is saved, or the run begins with what was saved there."""
    with accelerator(gradient_accumulation_steps=2) as one:
        return _run_accelerated(one, model, folder, resume)


def _run_accelerated(accelerator: Any, model: dtme.MultiTaskModel, folder: Path | None, resume: bool) -> Any:
    optimizer = loops.optimizer_of(model)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, _loader())
    prepared.train()
    for index, batch in enumerate(loader):
        if index < STEPS and resume:
            continue
        if index == STEPS and folder is not None:
            if resume:  # inside of the loop, whose iterator draws a random number
                accelerator.load_state(folder)
            else:
                accelerator.save_state(folder)
                accelerator.unwrap_model(prepared).save_pretrained(folder)
        with accelerator.accumulate(prepared):
            found = prepared(batch["pixel_values"])
            losses = [LOSSES[task](found[task], batch["labels"][task]) for task in loops.TASKS]
            accelerator.backward(torch.stack(losses).sum())
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(prepared.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    return accelerator.unwrap_model(prepared)


@situation(ACCELERATE, "accumulation and clipping", against="a plain loop", limit=1e-12, needs=NEEDED)
def accelerate_run() -> float:
    plain = loops.expanded_model()
    found = loops.weights(_accelerated(loops.expanded_model()))
    loops.train(plain, loops.in_steps(list(_loader()), 2), clip=0.5)
    return largest(found, loops.weights(plain))


@situation(
    ACCELERATE,
    "a saved state is a saved model, and goes on",
    against="the same bits of a run without a break",
    limit=0.0,
    needs=NEEDED,
)
def accelerate_resumed() -> float:
    with _quietly() as folder:
        torch.manual_seed(3)
        whole = _accelerated(loops.expanded_model(loops.vit(dropout=0.2)), folder)
        fresh = loops.plain_model(loops.vit(dropout=0.2))
        again = dtme.MultiTaskModel.from_pretrained(folder, fresh.backbone, fresh.heads)
        return _equal_bits(loops.weights(_accelerated(again, folder, resume=True)), loops.weights(whole))
