"""The picture of a report: what it shows, and that it stays readable with many blocks, pairs and tasks."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from dtme.plots import MOST_PAIRS, plot_report
from dtme.units import Units
from tests.dtme.reports import made_up, square


def picture(num_blocks, num_tasks, **options):
    rates = 0.35 + 0.1 * torch.rand(num_blocks, 1, generator=torch.Generator().manual_seed(0))
    spread = torch.linspace(0, 0.2, num_tasks * (num_tasks - 1) // 2)
    report = made_up(rates + spread, rates + spread.flip(0), num_tasks=num_tasks, valid=100, **options)
    figure = plot_report(report, report.plan(), report.stability())
    figure.canvas.draw()
    return report, figure


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_rates_have_error_bars_and_chance_is_marked():
    report, figure = picture(4, 3)
    rates, choice = figure.axes[:2]
    assert len(rates.containers) == 2 and any("chance" in text for text in texts(rates))
    (_, _, (bars,)) = rates.containers[0]
    ends = torch.tensor([bar[:, 1].tolist() for bar in bars.get_segments()], dtype=torch.float64)
    torch.testing.assert_close(ends, report.intervals("range"))
    chosen = {kind: (shares >= 0.01).sum().item() for kind, shares in report.stability().items()}
    assert sum(text.endswith("%") for text in texts(choice)) == sum(chosen.values())
    _, plain = picture(4, 3, num_units=5)
    assert not plain.axes[0].containers and not texts(plain.axes[1])


@pytest.mark.parametrize("num_shared", [0, 1])
def test_blocks_without_rates_are_marked_and_explained_beside_nothing(num_shared):
    """The note has a line of its own, however narrow the picture; a block that no plan is about is no empty cell."""
    report = made_up([0.3, 0.4], [0.5, 0.4], num_tasks=2)
    counts = [count.clone() for count in report.units[:3]]
    for count in counts:
        count[:, num_shared:] = 0
    fields = {f"{name}_counts": square(c.sum(0), 2) for name, c in zip(("range", "null", "valid"), counts, strict=True)}
    units, reached = Units(*counts, report.units.batches), torch.tensor([[True, True], [True, False]])
    report = replace(report, units=units, reached=reached, **fields)
    figure = plot_report(report, report.plan(), report.stability())
    figure.canvas.draw()
    rates, choice = figure.axes[:2]
    (note,) = [text for text in rates.texts if "grey" in text.get_text()]
    assert "blocks that fewer than two tasks reach" in note.get_text()
    assert ("where no two tasks have gradients at the same token" in note.get_text()) == (num_shared == 0)
    assert ("intervals" in note.get_text()) == (num_shared == 1)
    others = [rates.title, rates._left_title, rates._right_title]
    boxes = [text.get_window_extent() for text in others if text.get_text()]
    assert len(boxes) == 1 and not boxes[0].overlaps(note.get_window_extent())
    assert note.get_window_extent().x1 < figure.bbox.x1 and boxes[0].y1 <= figure.bbox.y1
    assert texts(choice) == ["–"] * 4 if not num_shared else texts(choice) == ["100%", "–", "100%", "–"]
    assert bool(choice.get_title(loc="right")) == (num_shared > 0)


@pytest.mark.parametrize(("num_blocks", "num_tasks"), [(4, 3), (48, 3), (4, 12), (48, 12), (4, 30)])
def test_no_labels_overlap(num_blocks, num_tasks):
    _, figure = picture(num_blocks, num_tasks)
    assert max(figure.get_size_inches()) < 16
    for axes in figure.axes[1:]:
        for axis, side in ((axes.xaxis, 0), (axes.yaxis, 1)):
            boxes = [label.get_window_extent() for label in axis.get_ticklabels() if label.get_text()]
            ends = sorted((box.x0, box.x1) if side == 0 else (box.y0, box.y1) for box in boxes if box.width > 1)
            assert all(first[1] < second[0] + 2 for first, second in pairwise(ends))
    rows = figure.axes[2].get_images()[0].get_array().shape
    num_pairs = num_tasks * (num_tasks - 1) // 2
    assert rows == ((num_pairs, num_blocks) if num_pairs <= MOST_PAIRS else (num_tasks, num_tasks))


def test_colours_span_the_rates_there_are():
    for shift, colours in ((-0.2, "Blues_r"), (0.3, "Reds"), (0.08, "RdBu_r")):
        rates = torch.tensor([[0.4, 0.41, 0.42], [0.43, 0.41, 0.39]]) + shift
        report = made_up(rates, rates, noise=0.001, valid=10_000)
        image = plot_report(report, report.plan()).axes[2].get_images()[0]
        seen = torch.stack([report.pair_rates(space) for space in ("range", "null")])
        known = seen[~seen.isnan()]
        assert image.get_cmap().name == colours
        low, high = image.get_clim()
        if colours == "RdBu_r":
            assert low + high == pytest.approx(1) and min(known.min().item() - low, high - known.max().item()) < 1e-9
        else:
            assert (low, high) == (known.min().item(), known.max().item())


def test_a_hundred_tasks_are_a_matrix_over_the_blocks_of_the_plan():
    rates = 0.4 + 0.01 * torch.arange(3)[:, None]
    report = made_up(rates, rates, num_tasks=100, num_units=8, valid=20)
    figure = plot_report(report, report.plan())
    image = figure.axes[3].get_images()[0].get_array()
    chosen = [report.blocks.index(block) for block in report.plan().blocks]
    expected = report.null_counts[chosen].sum(0) / report.valid_counts[chosen].sum(0)
    assert image.shape == (100, 100) and image[3, 7] == pytest.approx(expected[3, 7].item())
    assert "blocks of the plan" in figure.axes[3].get_title(loc="left")


def test_names_of_hosts_with_stages_are_on_end():
    names = tuple(f"layers.{s}.blocks.{b}" for s, n in enumerate((2, 2, 18, 2)) for b in range(n))
    report = made_up([0.4] * 24, [0.4] * 24, blocks=names)
    figure = plot_report(report, report.plan())
    figure.canvas.draw()
    labels = figure.axes[3].get_xticklabels()
    assert len(labels) == 24 and {label.get_rotation() for label in labels} == {90}
    assert labels[5].get_text() == "2.blocks.1"
