"""The picture of a conflict report."""

from typing import TYPE_CHECKING, Any

from .plan import ExpansionPlan

if TYPE_CHECKING:
    from .report import ConflictReport

RANGE, NULL, TEXT, EMPTY = "#2f6fb0", "#d9772b", "#444444", "#eeeeee"


def plot_report(report: "ConflictReport", plan: ExpansionPlan) -> Any:
    """A matplotlib figure: rates per block, the plan's choices underneath, and the rates of every pair of tasks."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot() needs matplotlib: pip install 'dtme-kernels[plot]'") from error
    num_blocks = len(report.blocks)
    pairs = [(i, j) for i in range(len(report.tasks)) for j in range(i + 1, len(report.tasks))]
    figure = Figure(figsize=(max(7.0, 0.55 * num_blocks + 2.5), 4.2 + 0.26 * len(pairs) * 2), layout="constrained")
    ratios = [3.2, 0.55, 0.3 * len(pairs) + 0.3, 0.3 * len(pairs) + 0.3]
    rates, choice, in_range, in_null = figure.subplots(4, 1, sharex=True, height_ratios=ratios)
    _rates(rates, report)
    _choice(choice, report, plan)
    for axes, counts, name, colors in (
        (in_range, report.range_counts, "range", "Blues"),
        (in_null, report.null_counts, "null", "Oranges"),
    ):
        values = [[float(counts[d, i, j] / report.valid_counts[d, i, j]) for d in range(num_blocks)] for i, j in pairs]
        image = axes.imshow(values, cmap=colors, aspect="auto", vmin=0, vmax=1)
        axes.set_facecolor(EMPTY)  # where a pair has no rate
        axes.set_yticks(range(len(pairs)), [f"{report.tasks[i]} · {report.tasks[j]}" for i, j in pairs], fontsize=8)
        axes.set_title(f"{name} space, by pair of tasks", fontsize=9, loc="left", color=TEXT)
        figure.colorbar(image, ax=axes, format=lambda value, _: f"{value:.0%}", ticks=[0, 0.5, 1], pad=0.01)
    names = _short(report.blocks)
    fits = sum(map(len, names)) + 2 * num_blocks <= 13 * figure.get_figwidth()
    in_null.set_xticks(range(num_blocks), names, fontsize=8, rotation=0 if fits else 90)
    in_null.set_xlabel("block")
    return figure


def _rates(axes: Any, report: "ConflictReport") -> None:
    x = range(len(report.blocks))
    for values, color, marker, name in (
        (report.range_rates, RANGE, "o", "range"),
        (report.null_rates, NULL, "s", "null"),
    ):
        axes.plot(x, values.tolist(), color=color, marker=marker, markersize=5, linewidth=1.8, label=f"{name} space")
    shared = set(report.shared_blocks)
    for d, block in enumerate(report.blocks):
        if block not in shared:
            axes.axvspan(d - 0.5, d + 0.5, color=EMPTY, linewidth=0, zorder=0)
            axes.set_title("grey: blocks that fewer than two tasks reach", loc="right", fontsize=9, color="#888888")
    axes.set_xlim(-0.5, len(report.blocks) - 0.5)
    axes.axhline(0.5, color="#bbbbbb", linewidth=0.8, linestyle="--", zorder=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_ylabel("conflicting (token, pair)s")
    axes.set_title("Token-space gradient conflicts by block", loc="left", fontsize=11, color=TEXT)
    axes.legend(frameon=False, ncols=2, loc="best", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def _choice(axes: Any, report: "ConflictReport", plan: ExpansionPlan) -> None:
    shared = report.shared_blocks
    for row, (blocks, color) in enumerate(((plan.modulation, RANGE), (plan.expansion, NULL))):
        for d, block in enumerate(report.blocks):
            if block not in shared:
                continue
            share = len(blocks.get(block, ())) / len(plan.tasks)
            axes.barh(
                row,
                0.9,
                left=d - 0.45,
                height=0.8,
                color=color if share else EMPTY,
                alpha=0.35 + 0.65 * share if share else 1,
            )
    axes.set_yticks([0, 1], ["modulation", "expansion"], fontsize=8)
    axes.set_ylim(1.5, -0.5)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _short(blocks: tuple[str, ...]) -> list[str]:
    """Names without what they all start with: 'encoder.layer.3' among its like is '3'."""
    parts = [block.split(".") for block in blocks]
    common = 0
    while all(len(p) > common + 1 for p in parts) and len({p[common] for p in parts}) == 1:
        common += 1
    return [".".join(p[common:]) for p in parts]
