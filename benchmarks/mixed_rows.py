"""``python -m benchmarks.mixed_rows``: what a batch costs whose rows have tasks of their own, in one pass.

Of 64 images each has one of 50 tasks, by chance. Rivals are a pass per task over its own images, and the same batch for
one task alone, which is the least that it can cost. A step is forward and backward of a model whose last half of blocks
is modulated and expanded for every task. Writes ``benchmarks/results/mixed_rows.json`` and prints it.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import dtme
from benchmarks.kernels.conftest import Shape
from benchmarks.kernels.device import DEVICE, facts
from benchmarks.kernels.race import Rival, race
from benchmarks.kernels.vit import plain_model
from benchmarks.many_tasks import SHAPE, plan_for
from dtme.mixed_rows import rows_by_task

RESULT = Path(__file__).parent / "results" / "mixed_rows.json"


class Subject:
    """A model, a batch, and the task of each of its rows."""

    def __init__(self, shape: Shape) -> None:
        torch.manual_seed(0)
        self.model = plain_model(shape)
        dtme.expand(self.model, plan_for(self.model.tasks, shape, None))
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if ".dtme." in name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        self.model.to(DEVICE)
        self.x = torch.randn(shape.images, shape.tokens, shape.channels, device=DEVICE)
        tasks = self.model.tasks
        self.task_of_row = [tasks[i] for i in torch.randint(len(tasks), (shape.images,)).tolist()]
        self.rows = rows_by_task(self.task_of_row, tasks)

    def one_pass(self) -> dict[str, torch.Tensor]:
        return self.model(self.x, task_of_row=self.task_of_row)

    def pass_per_task(self) -> dict[str, torch.Tensor]:
        return {task: self.model(self.x[rows], task)[task] for task, rows in self.rows.items()}

    def one_task(self) -> dict[str, torch.Tensor]:
        return self.model(self.x, self.model.tasks[0])

    def gradients(self, predict: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        self.model.zero_grad()
        torch.stack([prediction.square().sum() for prediction in predict().values()]).sum().backward()
        return {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}

    def check(self) -> None:
        """That one pass predicts and learns what a pass per task does."""
        found, want = (
            {k: g.clone() for k, g in self.gradients(f).items()} for f in (self.one_pass, self.pass_per_task)
        )
        assert found.keys() == want.keys(), "gradients of other parameters"
        largest = max(g.abs().max().item() for g in want.values())
        worst = max((found[name] - g).abs().max().item() for name, g in want.items()) / largest
        assert worst < 1e-4, f"gradients differ by {worst:.1e} of the largest"


def measure(shape: Shape, rounds: int) -> dict[str, Any]:
    """Seconds of the processor of each rival, medians of interleaved rounds, and their ratios to one pass."""
    subject = Subject(shape)
    kinds: dict[str, Callable[[Callable[[], Any]], Any]] = {"step": subject.gradients, "inference": _inference}
    found: dict[str, Any] = {"tasks in the batch": len(subject.rows)}
    for kind, run in kinds.items():
        seconds: dict[str, list[float]] = {}
        rivals = {}
        for name in ("one_pass", "pass_per_task", "one_task"):
            times = seconds.setdefault(name, [])
            check = subject.check if name == "one_pass" else lambda: None
            rivals[name] = Rival(_timed(run, getattr(subject, name), times), check)
        for name, result in race(rivals, DEVICE, rounds=rounds).items():
            if result.error:
                raise RuntimeError(f"{name}: {result.error}")
        medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}  # the first compares rows
        found[kind] = {
            **{f"{name} CPU s": median for name, median in medians.items()},
            "pass_per_task / one_pass": medians["pass_per_task"] / medians["one_pass"],
            "one_pass / one_task": medians["one_pass"] / medians["one_task"],
        }
    return found


def _inference(predict: Callable[[], Any]) -> Any:
    with torch.no_grad():
        return predict()


def _timed(run: Callable[[Any], Any], predict: Any, times: list[float]) -> Callable[[], None]:
    def timed() -> None:
        start = time.process_time()
        run(predict)
        times.append(time.process_time() - start)

    return timed


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mixed_rows", description=__doc__)
    parser.add_argument("--tasks", type=int, default=50)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=RESULT)
    chosen = parser.parse_args()
    shape = SHAPE._replace(images=chosen.images, tasks=chosen.tasks)
    content = {"facts": facts(), "shape": shape._asdict(), **measure(shape, chosen.rounds)}
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(content, indent=1) + "\n")
    print(f"{chosen.images} rows of {content['tasks in the batch']} of {chosen.tasks} tasks")
    for kind in ("step", "inference"):
        print(kind, ", ".join(f"{name} {value:.3g}" for name, value in content[kind].items()))


if __name__ == "__main__":
    main()
