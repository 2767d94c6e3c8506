"""The figures of a report: what they show is in the runs, and every label can be read."""

import math

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex

from benchmarks.paper.report import figures
from benchmarks.paper.report.comparison import compare
from benchmarks.paper.report.figures import MOST_COLOURED, conflicts, differences, draw, label, losses, tasks
from benchmarks.paper.report.folder import read_folder
from tests.paper.result_folders import TASKS, ResultFolder, noisy_folder

LONG = "a rather long title of an arm with many words in it and the number"
ALL = (differences, tasks, conflicts, losses)


def small(path, seeds=range(3)):
    folder = ResultFolder(path, ["single", "joint", "tm", "noisy", "gone"], seeds).single()
    for seed in folder.seeds:
        folder.run("joint", seed, -4.0)
        folder.run("tm", seed, {"semseg": 1.0 + 0.1 * seed, "depth": -2.0})
        folder.run("noisy", seed, 5.0 * (-1) ** seed)
        folder.run("gone", seed, status="diverged", metrics={})
    return compare(read_folder(path))


def texts(axis_labels):
    return [text.get_text() for text in axis_labels]


def test_differences_show_every_seed_and_the_interval(tmp_path):
    comparison = small(tmp_path)
    axes = differences(comparison).axes[0]
    assert texts(axes.get_yticklabels()) == ["single", "tm", "noisy"]  # gone has no number
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    means = [line for line in axes.lines if line.get_marker() == "D"]
    bars = [line for line in axes.lines if line.get_marker() == "None" and len(set(line.get_ydata())) == 1]
    for row, name in enumerate(("single", "tm", "noisy")):
        test = comparison.differences[name]
        assert list(dots[row].get_xdata()) == list(test.by_seed.values())
        assert list(bars[row].get_xdata()) == [test.difference.low, test.difference.high]
        assert means[row].get_xdata()[0] == test.difference.mean
        is_filled = to_hex(means[row].get_markerfacecolor()) != "#ffffff"
        assert is_filled == test.is_better == (name != "noisy")
        low, high = axes.get_xlim()
        assert all(low < value < high for value in (*test.by_seed.values(), 0))


def test_a_wide_interval_does_not_squeeze_the_seeds(tmp_path):
    comparison = small(tmp_path, range(2))  # the interval of two seeds that differ by 10 is 64 points long
    axes = differences(comparison).axes[0]
    low, high = axes.get_xlim()
    noisy = comparison.differences["noisy"].difference
    assert noisy.half_width > 60 and high - low < 40
    arrows = {line.get_marker(): (line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines}
    assert arrows["<"] == (low, 2) and arrows[">"] == (high, 2)  # of noisy, whose interval goes on


def test_one_seed_has_dots_and_no_bar(tmp_path):
    axes = differences(small(tmp_path, [0])).axes[0]
    assert not [line for line in axes.lines if line.get_marker() == "None" and len(set(line.get_ydata())) == 1]
    assert len([line for line in axes.lines if line.get_marker() == "D"]) == 3


def test_equal_arms_have_a_picture(tmp_path):
    folder = ResultFolder(tmp_path, ["joint", "tm"], range(2))
    for seed in range(2):
        folder.run("joint", seed).run("tm", seed)
    low, high = differences(compare(read_folder(tmp_path))).axes[0].get_xlim()
    assert low < 0 < high


def test_heat_map_shows_the_terms_and_dashes(tmp_path):
    folder = ResultFolder(tmp_path, ["single", "joint", "tm"], range(2)).single()
    for seed in range(2):
        folder.run("joint", seed, {"semseg": -4.0, "depth": -1.0 - seed})
        folder.run("tm", seed, metrics={"semseg": 41.0, "depth": None})
    axes = tasks(compare(read_folder(tmp_path))).axes[0]
    values = np.asarray(axes.images[0].get_array().filled(math.nan))
    np.testing.assert_allclose(values, [[-4, -1.5], [2.5, math.nan]])
    assert [text.get_text() for text in axes.texts] == ["-4.0", "-1.5", "+2.5", "–"]
    assert texts(axes.get_xticklabels()) == list(TASKS) and texts(axes.get_yticklabels()) == ["joint", "tm"]
    low, high = axes.images[0].get_clim()
    assert low == -high  # white is zero


def test_conflicts_have_a_panel_per_arm_with_both_moments(tmp_path):
    comparison = compare(read_folder(noisy_folder(tmp_path, {"joint": -4.0, "tm": 1.0}, range(2)).path))
    panels = [axes for axes in conflicts(comparison).axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in panels] == ["joint", "tm"]  # single tasks have none
    lines = {line.get_label(): line for line in panels[1].lines}
    assert lines.keys() == {"chance", *(f"{s} space, {m}" for s in ("range", "null") for m in ("start", "end"))}
    expected = [0.089 * (1 + 0.05 * i) for i in range(12)]  # 90 - 1 of 1000 in the first block
    np.testing.assert_allclose(lines["range space, end"].get_ydata(), expected)


def test_losses_are_means_over_seeds_and_colour_the_baseline_and_the_best(tmp_path):
    arms = {"joint": -4.0, **{f"arm {i}": i / 10 for i in range(10)}}
    comparison = compare(read_folder(noisy_folder(tmp_path, arms, range(2), spread=0.01).path))
    chosen = figures.coloured(comparison, list(comparison.arms.values()))
    assert chosen == ["joint", *(f"arm {i}" for i in range(9, 9 - MOST_COLOURED + 1, -1))]
    figure = losses(comparison)
    by_colour = {}
    for line in figure.axes[0].lines:
        by_colour.setdefault(to_hex(line.get_color()), []).append(line)
    assert len(by_colour[figures.COLOURS[0]]) == 1 and len(by_colour[figures.QUIET]) == 12 - MOST_COLOURED
    curves = comparison.arms["joint"].losses["semseg"]
    np.testing.assert_allclose(by_colour[figures.COLOURS[0]][0].get_ydata(), np.mean(list(curves.values()), 0))
    assert "5 other arms" in texts(figure.legends[0].get_texts())


def test_nothing_to_see_is_no_figure(tmp_path):
    folder = ResultFolder(tmp_path, ["joint"], [0]).run("joint", 0, losses={})
    comparison = compare(read_folder(folder.path))
    assert [figure(comparison) for figure in ALL] == [None] * 4
    assert draw(comparison, tmp_path / "report") == []


def overlapping(boxes):
    return [
        (a, b) for i, a in enumerate(boxes) for b in boxes[i + 1 :] if a.width and b.width and a.padded(-1).overlaps(b)
    ]


@pytest.mark.parametrize("arms", [1, 2, 26])
def test_labels_can_be_read(tmp_path, arms):
    """However many arms and however long their names: no label lies on another, or outside the picture."""
    names = {"joint": -4.0, **{f"arm{i}": i / 10 - 2 for i in range(arms - 1)}}
    many = {f"principal_task_{i}": TASKS["depth"] for i in range(11)}
    folder = noisy_folder(tmp_path, names, range(2), tasks=many if arms > 2 else TASKS)
    comparison = compare(read_folder(folder.path))
    for arm in comparison.arms.values():
        arm.title = f"{LONG} {arm.name}"
    for make in ALL:
        figure = make(comparison)
        renderer = FigureCanvasAgg(figure).get_renderer()
        figure.draw(renderer)
        labels = []
        for axes in figure.axes:
            if axes.get_visible():
                low, high = sorted(axes.get_ylim())
                labels += [text for text in axes.get_yticklabels() if low <= text.get_position()[1] <= high]
                labels += [axes.xaxis.label, axes.title, axes._left_title]
        for legend in figure.legends:
            labels += legend.get_texts()
        boxes = [text.get_window_extent(renderer) for text in labels if text.get_text() and text.get_visible()]
        assert boxes and not overlapping(boxes), make.__name__
        page = figure.bbox.padded(1)
        assert all(page.containsx(x) for b in boxes for x in (b.x0, b.x1)), make.__name__
        assert all(page.containsy(y) for b in boxes for y in (b.y0, b.y1)), make.__name__


def test_label_keeps_the_ends_of_a_long_title():
    assert label("short") == "short" and label("two lines of words", 10) == "two lines\nof words"
    text = label(f"{LONG} 17", 30)
    first, second = text.split("\n")
    assert first.startswith("a rather long") and second.endswith("number 17") and "…" in text
    assert max(map(len, text.split("\n"))) <= 30
    assert max(map(len, label("x" * 200, 30).split("\n"))) <= 30
