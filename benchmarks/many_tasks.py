"""``python -m benchmarks.many_tasks``: what many tasks cost in training and analysis, each by itself and in groups.

A step is forward and backward of all tasks at once, of a model whose last half of blocks is modulated and expanded for
every task; an analysis is ``dtme.analyze`` of the same model on two batches of that size. Writes
``benchmarks/results/many_tasks.json`` and prints it.
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import dtme
from benchmarks.kernels.conftest import Shape
from benchmarks.kernels.device import DEVICE, facts
from benchmarks.kernels.race import Result, Rival, race
from benchmarks.kernels.vit import plain_model

NUM_TASKS = (4, 16, 50, 100)
NUM_GROUPS = 8
SHAPE = Shape(images=2, tokens=65, channels=192, heads=3, task_tokens=1)
"""ViT-T on images of 128 x 128 pixels."""
RESULT = Path(__file__).parent / "results" / "many_tasks.json"


def plan_for(tasks: Sequence[str], shape: Shape, num_groups: int | None) -> dtme.ExpansionPlan:
    """The last half of the blocks, modulated and expanded for every task: ungrouped, or in groups of near equal size.

    As many groups as tasks, where there are fewer tasks than groups.
    """
    groups = (
        {} if num_groups is None else {f"group{i}": tasks[i::num_groups] for i in range(min(num_groups, len(tasks)))}
    )
    blocks = [f"blocks.{i}" for i in range(shape.blocks)]
    chosen = dict.fromkeys(blocks[shape.blocks // 2 :], tuple(tasks))
    return dtme.ExpansionPlan(
        tuple(tasks), shape.task_tokens, chosen, chosen, dict.fromkeys(blocks, shape.channels), groups
    )


class Subject:
    """A model and a batch, for a training step or an analysis of all tasks."""

    def __init__(self, model: dtme.MultiTaskModel, x: torch.Tensor) -> None:
        self.model, self.x = model, x
        self.cpu_seconds: dict[str, list[float]] = {"step": [], "analysis": []}
        """Of every run, what the process took on all its cores: right on a busy machine too."""

    def step(self) -> torch.Tensor:
        start = time.process_time()
        loss = torch.stack([prediction.square().mean() for prediction in self.model(self.x).values()]).sum()
        loss.backward()
        self.cpu_seconds["step"].append(time.process_time() - start)
        return loss.detach()

    def analysis(self) -> torch.Tensor:
        start = time.process_time()
        losses = {task: lambda prediction, target: prediction.square().mean() for task in self.model.tasks}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* tasks have")  # of more than 64, so many are drawn for each batch
            report = dtme.analyze(self.model, [(self.x, dict.fromkeys(losses, self.x))] * 2, losses, progress=False)
        self.cpu_seconds["analysis"].append(time.process_time() - start)
        return report.range_rates

    def check(self) -> None:
        """That a few tasks predict among each other what they predict alone."""
        tasks = self.model.tasks[:: max(1, len(self.model.tasks) // 4)]
        error = dtme.verify(self.model, self.x, tasks)
        assert error < 1e-3, f"tasks at once and alone differ by {error:.1e}"


def subjects(shape: Shape, num_groups: int) -> dict[str, tuple[dtme.ExpansionPlan, Subject]]:
    """A model ungrouped and a model grouped, with the plans they are by."""
    torch.manual_seed(0)
    x = torch.randn(shape.images, shape.tokens, shape.channels, device=DEVICE)
    found = {}
    for name, number in (("ungrouped", None), ("grouped", num_groups)):
        model = plain_model(shape)
        plan = plan_for(model.tasks, shape, number)
        dtme.expand(model, plan)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if ".dtme." in key:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        model.to(DEVICE)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)  # there before and after, and so in nobody's peak
        found[name] = plan, Subject(model, x)
    return found


def measure(shape: Shape, num_groups: int) -> list[dict[str, Any]]:
    """Time and memory of both, interleaved: one row each."""
    found = subjects(shape, num_groups)
    rows = {name: _row(shape, plan) for name, (plan, _) in found.items()}
    for kind, rounds in (("step", 9), ("analysis", 5 if shape.tasks < 100 else 1)):
        rivals = {name: Rival(getattr(one, kind), one.check) for name, (_, one) in found.items()}
        for name, result in race(rivals, DEVICE, rounds=rounds).items():
            rows[name][kind] = _cost(shape, found[name][1].cpu_seconds[kind], result)
    return list(rows.values())


def _row(shape: Shape, plan: dtme.ExpansionPlan) -> dict[str, Any]:
    return {
        "tasks": shape.tasks,
        "groups": len(plan.groups) or None,
        "streams": len(plan.owners(plan.tasks)),
        "compute": plan.compute(),
        "added parameters": plan.added_parameters(),
    }


def _cost(shape: Shape, cpu_seconds: Sequence[float], result: Result) -> dict[str, Any]:
    if result.error:
        raise RuntimeError(f"{shape.tasks} tasks: {result.error}")
    times = torch.tensor(result.seconds, dtype=torch.float64)
    low, median, high = times.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return {
        "median": median,
        "p20": low,
        "p80": high,
        "rounds": len(times),
        "cpu": statistics.median(cpu_seconds[1:]),  # the first allocates what the others find
        "peak MB": None if result.peak_bytes is None else result.peak_bytes / 1e6,
    }


def show(rows: Sequence[dict[str, Any]]) -> None:
    head = f"{'tasks':>6}{'groups':>8}{'streams':>9}{'compute':>9}"
    print(
        head + "".join(f"{kind + ' s':>13}{'20-80 %':>16}{'CPU s':>8}{'peak MB':>9}" for kind in ("step", "analysis"))
    )
    for row in rows:
        line = f"{row['tasks']:>6}{row['groups'] or '-':>8}{row['streams']:>9}{row['compute']:>9.2f}"
        for cost in (row["step"], row["analysis"]):
            spread, peak = f"{cost['p20']:.3f}-{cost['p80']:.3f}", cost["peak MB"]
            line += f"{cost['median']:>13.3f}{spread:>16}{cost['cpu']:>8.3f}{'-' if peak is None else f'{peak:.0f}':>9}"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.many_tasks", description=__doc__)
    parser.add_argument("--tasks", type=int, nargs="+", default=NUM_TASKS, help="numbers of tasks")
    parser.add_argument("--groups", type=int, default=NUM_GROUPS, help="in how many groups")
    parser.add_argument("--tokens", type=int, default=SHAPE.tokens, help="per image")
    parser.add_argument("--images", type=int, default=SHAPE.images, help="per step")
    parser.add_argument("--out", type=Path, default=RESULT)
    chosen = parser.parse_args()
    shape = SHAPE._replace(tokens=chosen.tokens, images=chosen.images)
    rows: list[dict[str, Any]] = []
    for number in chosen.tasks:
        rows += measure(shape._replace(tasks=number), chosen.groups)
        content = {"facts": facts(), "shape": {k: v for k, v in shape._asdict().items() if k != "tasks"}, "rows": rows}
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(json.dumps(content, indent=1) + "\n")  # what is known so far outlives an interrupt
    show(rows)


if __name__ == "__main__":
    main()
