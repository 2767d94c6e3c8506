"""``python -m benchmarks.many_tasks``: what a training step costs with many tasks, each by itself and in groups.

Forward and backward of all tasks at once, of a model whose last half of blocks is modulated and expanded for every
task. Writes ``benchmarks/results/many_tasks.json`` and prints it.
"""

import argparse
import json
import statistics
import time
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


class Step:
    """A training step of all tasks on one batch."""

    def __init__(self, model: dtme.MultiTaskModel, x: torch.Tensor) -> None:
        self.model, self.x = model, x
        self.cpu_seconds: list[float] = []
        """Of every run, what the process took on all its cores: right on a busy machine too."""

    def run(self) -> torch.Tensor:
        start = time.process_time()
        loss = torch.stack([prediction.square().mean() for prediction in self.model(self.x).values()]).sum()
        loss.backward()
        self.cpu_seconds.append(time.process_time() - start)
        return loss.detach()

    def check(self) -> None:
        """That a few tasks predict among each other what they predict alone."""
        tasks = self.model.tasks[:: max(1, len(self.model.tasks) // 4)]
        error = dtme.verify(self.model, self.x, tasks)
        assert error < 1e-3, f"tasks at once and alone differ by {error:.1e}"


def steps(shape: Shape, num_groups: int) -> dict[str, tuple[dtme.ExpansionPlan, Step]]:
    """A step ungrouped and a step grouped, with the plans they are by."""
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
        found[name] = plan, Step(model, x)
    return found


def measure(shape: Shape, num_groups: int) -> list[dict[str, Any]]:
    """Time and memory of both steps, interleaved: one row each."""
    found = steps(shape, num_groups)
    results = race({name: Rival(step.run, step.check) for name, (_, step) in found.items()}, DEVICE, rounds=9)
    return [_row(shape, *found[name], result) for name, result in results.items()]


def _row(shape: Shape, plan: dtme.ExpansionPlan, step: Step, result: Result) -> dict[str, Any]:
    if result.error:
        raise RuntimeError(f"{shape.tasks} tasks: {result.error}")
    times = torch.tensor(result.seconds, dtype=torch.float64)
    low, median, high = times.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return {
        "tasks": shape.tasks,
        "groups": len(plan.groups) or None,
        "streams": len(plan.owners(plan.tasks)),
        "compute": plan.compute(),
        "added parameters": plan.added_parameters(),
        "step": {
            "median": median,
            "p20": low,
            "p80": high,
            "rounds": len(times),
            "cpu": statistics.median(step.cpu_seconds[1:]),  # the first allocates what the others find
            "peak MB": None if result.peak_bytes is None else result.peak_bytes / 1e6,
        },
    }


def show(rows: Sequence[dict[str, Any]]) -> None:
    print(
        f"{'tasks':>6}{'groups':>8}{'streams':>9}{'compute':>9}{'step s':>10}{'20-80 %':>18}{'CPU s':>9}{'peak MB':>10}"
    )
    for row in rows:
        step, groups = row["step"], row["groups"] or "-"
        spread, peak = f"{step['p20']:.3f}-{step['p80']:.3f}", step["peak MB"]
        line = f"{row['tasks']:>6}{groups:>8}{row['streams']:>9}{row['compute']:>9.2f}"
        line += f"{step['median']:>10.3f}{spread:>18}{step['cpu']:>9.3f}"
        print(line + ("" if peak is None else f"{peak:>10.0f}"))


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
