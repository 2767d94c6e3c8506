"""Files: saved, loaded, sharded, damaged."""

import copy
import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import dtme

from .situation import largest, situation

STACK, TASKS, WIDTH = "files", ("a", "b", "c"), 8
PLANS = (
    dtme.ExpansionPlan(TASKS, 2, {"0": ("a",)}, {"1": TASKS}),
    dtme.ExpansionPlan(TASKS, 2, {"0": ("a", "b"), "1": ("c",)}, {"1": ("a", "b")}, groups={"ab": ("a", "b")}),
)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(WIDTH), Attention()
        self.norm2, self.mlp = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def parts(seed: int, tied: bool = False) -> tuple[nn.Module, dict[str, nn.Module]]:
    torch.manual_seed(seed)
    heads = {task: nn.Linear(WIDTH, 3) for task in TASKS}
    if tied:
        heads["b"].weight = heads["a"].weight
    return nn.Sequential(Block(), Block()), dict(heads)


def expanded(plan: dtme.ExpansionPlan, seed: int = 0, tied: bool = False, **options: Any) -> dtme.MultiTaskModel:
    """A model whose added parameters are not those that it began with."""
    model = dtme.expand(dtme.MultiTaskModel(*parts(seed, tied)), plan, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return model


def loaded(folder: str | Path, seed: int = 9, dtype: torch.dtype = torch.float32) -> dtme.MultiTaskModel:
    """What the folder holds, in parts that had other values before."""
    backbone, heads = parts(seed)
    heads = {task: head.to(dtype) for task, head in heads.items()}
    return dtme.MultiTaskModel.from_pretrained(folder, backbone.to(dtype), heads)


def changed(again: dtme.MultiTaskModel, model: dtme.MultiTaskModel) -> float:
    """How far states and predictions are apart; infinite where not even their types and plans are the same."""
    state, want = again.state_dict(), model.state_dict()
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1)).to(next(model.parameters()).dtype)
    if [value.dtype for value in state.values()] != [value.dtype for value in want.values()]:
        return float("inf")
    with torch.no_grad():
        return max(largest(state, want), largest(again.eval()(x), model.eval()(x)))


@situation(STACK, "tied weights in three precisions", against="the model that was saved", limit=0.0)
def tied() -> float:
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            model = expanded(PLANS[1], tied=True).to(dtype)
            model.save_pretrained(folder)
            worst = max(worst, changed(loaded(folder, dtype=dtype), model))
    return worst


@situation(STACK, "batch norm's statistics, frozen weights", against="the model that was saved", limit=0.0)
def statistics() -> float:
    model = expanded(PLANS[1], modulator="batch_norm", freeze_backbone=True)
    model.train()(torch.randn(4, 5, WIDTH))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = loaded(folder)
    trained = [[n for n, p in one.named_parameters() if p.requires_grad] for one in (model, again)]
    return changed(again, model) if trained[0] == trained[1] else float("inf")


@situation(STACK, "only what expand added: groups and gates", against="the model that was saved", limit=0.0)
def only_added() -> float:
    model = expanded(PLANS[0])
    dtme.replan(model, PLANS[1], gate_tokens=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".dtme." in name:
                parameter.add_(0.5 * torch.randn_like(parameter))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, expansion_only=True)
        other = dtme.MultiTaskModel(*parts(9))
        state = {name: value for name, value in model.state_dict().items() if ".dtme." not in name}
        other.load_state_dict(state)
        again = dtme.MultiTaskModel.from_pretrained(folder, other.backbone, other.heads)
    return changed(again, model)


@situation(STACK, "training that goes on from a save", against="training without a break", limit=0.0)
def resumed() -> float:
    def train(model: dtme.MultiTaskModel, optimizer: torch.optim.Optimizer) -> None:
        for seed in range(3):
            x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(seed))
            optimizer.zero_grad()
            sum(prediction.square().mean() for prediction in model(x).values()).backward()
            optimizer.step()

    model = expanded(PLANS[1])
    optimizer = torch.optim.Adam(model.parameter_groups(lr=1e-2))
    train(model, optimizer)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = loaded(folder)
    other = torch.optim.Adam(again.parameter_groups(lr=1e-2))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer), train(again, other)
    return changed(again, model)


def numbered(number: int) -> dtme.MultiTaskModel:
    """All parameters are ``number``; even and odd ones have different plans."""
    return fill(expanded(dtme.ExpansionPlan(TASKS, 2, PLANS[number % 2].modulation)), number)


def fill(model: dtme.MultiTaskModel, number: int) -> dtme.MultiTaskModel:
    for parameter in model.parameters():
        nn.init.constant_(parameter, number)
    return model


def number_of(folder: str | Path) -> int:
    """Which of the numbered models is in the folder; -1 where it is none of them."""
    model = loaded(folder)
    values = {value for parameter in model.parameters() for value in parameter.flatten().tolist()}
    (number, *others) = values
    names = model.state_dict().keys()
    return -1 if others or names != numbered(int(number)).state_dict().keys() else int(number)


@situation(STACK, "saves killed at twenty moments", against="the old model or the new, and nothing beside", limit=0.0)
def killed(times: int = 20) -> float:
    """How many loads after a kill gave another model, or whose next save left something behind."""
    wrong, moments = 0, random.Random(0)
    models = [numbered(number) for number in range(2)]
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(times):
            models[0].save_pretrained(folder)
            done = _killed_while_saving(models, folder, moments.uniform(0.0, 0.08))
            wrong += number_of(folder) not in (done, done + 1)
            models[1].save_pretrained(folder)
            wrong += sorted(os.listdir(folder)) != ["dtme_config.json", "model.safetensors"]
    return float(wrong)


def _killed_while_saving(models: list[dtme.MultiTaskModel], folder: str, seconds: float) -> int:
    """How many saves, of the models by turns and numbered from 1, a process completed before it was killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            os.write(writer, b"0")
            for number in range(1, 10**6):
                fill(models[number % 2], number).save_pretrained(folder)
                os.write(writer, b"1")
        finally:
            os._exit(1)
    os.read(reader, 1)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(writer)
    with os.fdopen(reader, "rb") as told:
        return len(told.read())


@situation(STACK, "loads beside saves of another plan", against="one of the models that were saved", limit=0.0)
def beside() -> float:
    """How many of forty loads gave a model that nobody saved."""
    models = [numbered(number) for number in range(2)]
    with tempfile.TemporaryDirectory() as folder:
        models[0].save_pretrained(folder)
        is_over = threading.Event()

        def save() -> None:
            for model in _endless(models):
                if is_over.is_set():
                    return
                model.save_pretrained(folder)

        thread = threading.Thread(target=save)
        thread.start()
        try:
            return float(sum(number_of(folder) not in (0, 1) for _ in range(40)))
        finally:
            is_over.set()
            thread.join()


def _endless(models: list[dtme.MultiTaskModel]) -> Iterator[dtme.MultiTaskModel]:
    while True:
        yield from models
