"""Learning rates, of every arm by the same rule: on other seeds, and on training items that are held out for it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from dtme.comparison.delta import delta_m

from ..results import read_json, run_path, write_json
from ..tasks import Tasks, lower_is_better
from .config import Config
from .schedule import Schedule, in_turn

FACTOR = 3.0
"""Between two learning rates that are tried."""
FIRST_SEED = 1000
"""Of tuning; seeds of experiments count from 0."""
HELD_OUT = 0.1
JOINT = "joint"


@dataclass
class Tuner:
    """Tries ``lr / 3``, ``lr`` and ``3 lr`` for each arm; where an end of these is the best, one more beyond it.

    The joint training comes first: the others leave it at its best rate, and their rates are tried around that. The
    score of a rate is Δm over the joint training at its best rate, in its mean over the seeds; of a task alone, the
    term of its task. ``OUT/tuning/tuned.json`` keeps what came out.
    """

    base: Config
    tasks: Tasks
    out: Path
    seeds: int
    jobs: int
    place: Mapping[str, Any]

    @property
    def path(self) -> Path:
        return self.out / "tuning" / "tuned.json"

    def known(self) -> dict[str, Any]:
        """``{arm, or arm.task: {"lr", "tried": {lr: score}, "is_at_edge", "seeds"}}`` of earlier calls.

        Raises:
            ValueError: the file holds something else.
        """
        known = read_json(self.path) if self.path.exists() else {}
        for name, facts in known.items() if isinstance(known, dict) else [("", known)]:
            lr = facts.get("lr") if isinstance(facts, dict) else None
            if not isinstance(lr, float) or not 0 < lr < math.inf:
                advice = "Remove the file to tune anew"
                raise ValueError(f"{self.path}: {name!r} must have a positive lr, got {facts!r}. {advice}")
        return known

    def tune(self, runs: Sequence[tuple[str, str | None]]) -> dict[str, Any]:
        """Tune the arms, each with its task or None, that are not known yet."""
        known = self.known()
        joint = (JOINT, None)
        if JOINT not in known:
            self._search([joint], self.base.lr, known)
        others = [run for run in runs if run != joint and label(*run) not in known]
        if others:
            self._search(others, known[JOINT]["lr"], known)
        return known

    def _search(self, runs: Sequence[tuple[str, str | None]], middle: float, known: dict[str, Any]) -> None:
        rates = {run: [middle / FACTOR, middle, middle * FACTOR] for run in runs}
        self._run([config for run in runs for config in self._configs(run, rates[run], known)], "tuning")
        scores = {run: self._scores(run, rates[run], known) for run in runs}
        for run in runs:  # once beyond the end
            best = max(scores[run], key=scores[run].__getitem__)
            if best in (rates[run][0], rates[run][-1]):
                rates[run].append(best / FACTOR if best == rates[run][0] else best * FACTOR)
        self._run([config for run in runs for config in self._configs(run, rates[run][3:], known)], "tuning further")
        for run in runs:
            score = self._scores(run, rates[run], known)
            best = max(score, key=score.__getitem__)
            if not math.isfinite(score[best]):
                best = middle  # it diverges at all of them, which its runs will show
                tqdm.write(f"{label(*run)}: no rate of those tried has a score, {middle:g} stays")
            known[label(*run)] = {
                "lr": best,
                "tried": {f"{rate:g}": s if math.isfinite(s) else None for rate, s in sorted(score.items())},
                "is_at_edge": best in (min(score), max(score)),
                "seeds": list(self._seeds),
            }
        write_json(self.path, known)

    @property
    def _seeds(self) -> range:
        return range(FIRST_SEED, FIRST_SEED + self.seeds)

    def _configs(self, run: tuple[str, str | None], rates: Iterable[float], known: Mapping[str, Any]) -> list[Config]:
        arm, task = run
        common = replace(self.base, arm=arm, task=task, held_out=HELD_OUT, conflicts=False)
        return [
            replace(
                common,
                seed=seed,
                lr=rate,
                trunk_lr=known[JOINT]["lr"] if JOINT in known and task is None else rate,
                variant=f"lr-{rate:g}",
            )
            for rate in rates
            for seed in self._seeds
        ]

    def _run(self, configs: Sequence[Config], title: str) -> None:
        schedule = Schedule(
            in_turn(configs, self.jobs), self.out / "tuning", jobs=self.jobs, place=self.place, title=title
        )
        schedule.run()

    def _reference(self, rates: Sequence[float]) -> dict[int, dict[str, float | None]]:
        """{seed: metrics of the joint training} at the first of the rates that nothing speaks against at any seed.

        While the joint training itself is tuned, the rate in the middle may be one that diverges, and nothing is
        relative to that. Of rates that all have a fault, the first: no score is finite then.
        """
        found = [{c.seed: self._metrics(c) for c in self._configs((JOINT, None), [rate], {})} for rate in rates]
        return next((runs for runs in found if all(all(of_seed.values()) for of_seed in runs.values())), found[0])

    def _metrics(self, config: Config) -> dict[str, float | None]:
        return read_json(run_path(self.out / "tuning", config.name))["metrics"]

    def _scores(
        self, run: tuple[str, str | None], rates: Sequence[float], known: Mapping[str, Any]
    ) -> dict[float, float]:
        """{learning rate: its mean score over the seeds}; minus infinity where a run of it did not end well."""
        reference = self._reference([known[JOINT]["lr"]] if JOINT in known else [rates[1], rates[0], *rates[2:]])
        scores = {rate: 0.0 for rate in rates}
        for config in self._configs(run, rates, known):
            found = self._metrics(config)
            scores[config.lr] += score(found, reference[config.seed], self.tasks) / self.seeds
        return scores


def score(found: Mapping[str, float | None], reference: Mapping[str, float | None], tasks: Tasks) -> float:
    """Δm of what was found over the reference, in %; minus infinity if a metric is not defined."""
    values = {task: (value, reference[task]) for task, value in found.items()}
    if any(value is None or not base for value, base in values.values()):
        return -math.inf
    total, _ = delta_m(
        {task: float(value) for task, (value, _) in values.items()},  # type: ignore[arg-type]
        {task: float(base) for task, (_, base) in values.items()},  # type: ignore[arg-type]
        lower_is_better(tasks),
    )
    return total


def label(arm: str, task: str | None) -> str:
    return arm if task is None else f"{arm}.{task}"
