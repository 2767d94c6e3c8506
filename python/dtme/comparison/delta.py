"""What a multi-task model gains over single-task ones."""

import math
from collections.abc import Collection, Mapping


def delta_m(
    results: Mapping[str, float], baseline: Mapping[str, float], lower_is_better: Collection[str]
) -> tuple[float, dict[str, float]]:
    """Δm = 100/K Σ_i (-1)^{l_i} (M_i - B_i) / B_i: the mean gain over the single-task runs in %, and its terms.

    Args:
        results: task -> metric of the multi-task model.
        baseline: task -> metric of our own single-task run.
        lower_is_better: the tasks with l_i = 1.

    Returns:
        (total, {task: term}), in %; positive is better, and the total is the mean of the terms.

    Raises:
        ValueError: the two name different tasks or none, a value is NaN or infinite, or a baseline is not positive:
            nothing is relative to 0, and relative to a negative value, gains would count as losses.
    """
    if not results or results.keys() != baseline.keys():
        raise ValueError(f"results and baseline must name the same tasks, got {sorted(results)} and {sorted(baseline)}")
    for name, values in (("results", results), ("baseline", baseline)):
        if undefined := [task for task, value in values.items() if not math.isfinite(value)]:
            raise ValueError(f"{name} must be finite, for {undefined} they are not: leave out those tasks from both")
    if low := [task for task, value in baseline.items() if value <= 0]:
        raise ValueError(f"baseline must be above zero, for {low} it is not")
    terms = {
        task: (-100 if task in lower_is_better else 100) * (results[task] - base) / base
        for task, base in baseline.items()
    }
    return sum(terms.values()) / len(terms), terms
