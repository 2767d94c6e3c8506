"""The figures on fair joint training: what they show is in the numbers, and all of it can be read."""

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex

from benchmarks.paper.fair.figures import tasks, transfer
from benchmarks.paper.fair.folders import read_studies, read_study
from benchmarks.paper.report.figures import COLOURS
from tests.paper.fair_folders import condition, whole


def test_delta_m_has_its_seeds_its_interval_and_a_filled_mark_where_it_is_decided(tmp_path):
    study = read_study(whole(tmp_path))
    axes = transfer([study]).axes[0]
    labels = [text.get_text().replace("\n", " ") for text in axes.get_yticklabels()]
    assert labels == [
        "joint, tuned, 300 steps",
        "invpt-weights, tuned, 300 steps",
        "uw, tuned, 300 steps",
        "joint, the same rates, 600 steps",
        "joint, default rate",
        "joint, tuned, weight decay 0.001",
    ]
    places = {0: ("tuned", "joint"), 1: ("tuned", "invpt-weights"), 3: ("double", "joint"), 4: ("untuned", "joint")}
    for row, (key, arm) in places.items():
        effect = study.results[key].transfer[arm].total
        colour = COLOURS[list(study.conditions).index(key)]
        on_row = [line for line in axes.lines if len(line.get_ydata()) and line.get_ydata()[0] == row]
        bar = next(line for line in on_row if len(line.get_xdata()) == 2)
        assert list(bar.get_xdata()) == [effect.estimate.low, effect.estimate.high] and bar.get_color() == colour
        mean = next(line for line in on_row if line.get_xdata()[0] == effect.estimate.mean)
        assert (to_hex(mean.get_markerfacecolor()) == colour) == (effect.sign != 0)
        dots = next(line for line in axes.lines if list(line.get_ydata()) == [row + 0.2] * 3)
        assert list(dots.get_xdata()) == list(effect.by_seed.values())


def test_tasks_have_a_line_per_condition(tmp_path):
    study = read_study(whole(tmp_path))
    figure = tasks([study])
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["semseg", "depth"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [c.title for c in study.conditions.values()]
    means = [line for line in axes.lines if len(line.get_xdata()) == 1 and round(line.get_ydata()[0]) == 0]
    assert [line.get_xdata()[0] for line in means] == pytest.approx([-3.0, -2.0, -8.0, -3.0])


@pytest.mark.parametrize("make", [transfer, tasks])
def test_all_text_lies_in_the_picture(tmp_path, make):
    whole(tmp_path / "a")
    condition(tmp_path / "b", "steps-300", {"joint": -1.0}, backbone="a-backbone-with-a-long-name")
    figure = make(read_studies([tmp_path / "a", tmp_path / "b"]))
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    page = figure.bbox.padded(1)
    texts = [t for legend in figure.legends for t in legend.get_texts()]
    for axes in figure.axes:
        texts += [*axes.get_yticklabels(), axes.xaxis.label, axes._left_title]
        assert axes.get_window_extent(renderer).width > 0.25 * figure.bbox.width
    boxes = [text.get_window_extent(renderer) for text in texts if text.get_text()]
    assert boxes and all(page.containsx(x) for box in boxes for x in (box.x0, box.x1))
    assert all(page.containsy(y) for box in boxes for y in (box.y0, box.y1))
