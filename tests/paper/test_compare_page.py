"""The page on placements and adapters, its numbers and figures, and what it refuses."""

import json
import math
import re
import shlex
from argparse import ArgumentParser

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from benchmarks.paper.__main__ import main
from benchmarks.paper.compare import figures
from benchmarks.paper.compare.numbers import numbers
from benchmarks.paper.compare.page import page
from benchmarks.paper.runner.command import add_arguments
from tests.paper.compare_folders import TITLE, compared, edit, found, noisy, one_block, planted


def whole(path):
    """Two settings with everything that the page has."""
    one_block(path / "blocks", lambda kind, block, seed: block + 0.4 * math.cos(3 * seed + block), range(5))
    planted(path / "arms")
    return [path / "arms", path / "blocks"]


def values_of(content):
    if isinstance(content, dict):
        for key, value in content.items():
            yield from values_of(value)
            yield from (float(number) for number in re.findall(r"\d+", str(key)))
    elif isinstance(content, list):
        for value in content:
            yield from values_of(value)
    elif isinstance(content, str):
        yield from (float(number) for number in re.findall(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?", content))
    elif isinstance(content, int | float) and not isinstance(content, bool):
        assert math.isfinite(content)
        yield abs(float(content))


def test_every_number_of_a_table_is_in_the_json(tmp_path):
    findings = found(*whole(tmp_path))
    text = page(findings, [])
    known = np.array(list(values_of(json.loads(json.dumps(numbers(findings), allow_nan=False)))))
    known = np.concatenate([known, 100 * known, known / 60, known / 3600])
    shown = text[text.index("## Claims") : text.index("## Settings and what is missing")]
    cells = " ".join(line for line in shown.splitlines() if line.startswith("| "))
    for number in re.findall(r"\d[\d,]*(?:\.\d+)?", cells):
        digits = len(number.partition(".")[2])
        value = float(number.replace(",", ""))
        assert np.abs(known - value).min() <= 0.5 * 10**-digits + 1e-6, number
    assert not re.search(r"\bnan\b|\binf\b", text)


def test_the_same_runs_make_the_same_bytes(tmp_path):
    outs = whole(tmp_path)
    written = []
    for to in (tmp_path / "one", tmp_path / "two"):
        to.mkdir()
        (to / "blocks-3.png").touch()  # of an earlier report on more settings
        main(["compare-report", *map(str, outs), "--to", str(to)])
        written.append({path.name: path.read_bytes() for path in to.iterdir()})
    assert written[0] == written[1]
    assert written[0].keys() == {"report.md", "compare.json", "questions.png", "arms-1.png", "blocks-2.png"}
    text = written[0]["report.md"].decode() + written[0]["compare.json"].decode()
    assert str(tmp_path) not in text and "## Arms: rooms, small, 2 tasks (arms)" in text


def test_text_lies_in_the_figures(tmp_path):
    findings = found(*whole(tmp_path))
    arms, blocks = findings.settings
    for figure in (
        figures.questions(findings),
        figures.arms(findings, arms),
        figures.blocks(findings, blocks),
    ):
        renderer = FigureCanvasAgg(figure).get_renderer()
        figure.draw(renderer)
        page_box = figure.bbox.padded(1)
        texts = [t for legend in figure.legends for t in legend.get_texts()]
        for axes in figure.axes:
            low, high = sorted(axes.get_ylim())
            texts += [text for text in axes.get_yticklabels() if low <= text.get_position()[1] <= high]
            texts += [axes.xaxis.label, axes._left_title]
        boxes = [text.get_window_extent(renderer) for text in texts if text.get_text()]
        assert boxes and all(page_box.containsx(x) for box in boxes for x in (box.x0, box.x1))
        assert all(page_box.containsy(y) for box in boxes for y in (box.y0, box.y1))


def test_figures_show_means_intervals_and_every_random_run(tmp_path):
    findings = found(planted(tmp_path).path)
    axes = figures.arms(findings, TITLE).axes[0]
    labels = [text.get_text() for text in axes.get_yticklabels()]
    row = labels.index("tm+te")
    e = findings.settings[TITLE].against_joint["tm+te"].difference
    bars = [list(line.get_xdata()) for line in axes.lines if list(line.get_ydata()) == [row, row]]
    assert [e.low, e.high] in bars
    at = labels.index("random plans, mean of 2 plans")
    dots = next(line for line in axes.lines if list(line.get_ydata()) == [at + 0.22] * 10)
    assert sorted(dots.get_xdata()) == pytest.approx(sorted(noisy(1.5) + noisy(0.5)))
    assert len(axes.patches) == 1  # the band


def test_an_arm_far_from_all_others_does_not_squeeze_them(tmp_path):
    gains = {"longer": noisy(40.0), "tm+te": noisy(0.5), "random": noisy(0.2), "lora": noisy(0.1)}
    axes = figures.arms(found(compared(tmp_path, gains).path), TITLE).axes[0]
    assert axes.get_xlim()[1] < 3
    assert [text.get_text() for text in axes.texts] == ["+40.0 [+39.0, +41.0]"]


def test_the_printed_command_is_the_one_that_ran(tmp_path):
    options = {"root": "/some/where", "tasks": ["semseg", "depth"], "seed": 3, "size": [64, 48]}
    folder = compared(tmp_path / "out", {"tm+te": noisy(1.0)}, options=options, expand_at=0.5, conflicts=False)
    edit(folder, experiment="placement")
    findings = found(folder.path)
    command = shlex.split(re.search(r"```\n(.*)\n```", page(findings, []))[1])
    assert command[:4] == ["python", "-m", "benchmarks.paper", "run"]
    parser = ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args(command[4:])
    assert (args.experiment, args.steps, args.batch, args.lr, args.seeds) == ("placement", 100, 6, 1e-3, 5)
    assert (args.data_seed, args.size, args.expand_at, args.no_conflicts) == (3, [64, 48], 0.5, True)
    assert args.arms == ["joint", "tm+te"] and args.tasks == ["semseg", "depth"] and str(args.root) == "where"


def test_missing_and_diverged_runs_are_said(tmp_path):
    folder = planted(tmp_path)
    (folder.path / "runs" / "bitfit.seed-2.json").unlink()
    folder.run("lora", 1, status="diverged", reason="the loss of 'depth' is nan")
    text = page(found(folder.path), [])
    assert "> - rooms, small, 2 tasks: 1 run is missing" in text and "1 run diverged" in text
    assert "bitfit: seed 2" in text and "lora, seed 1: the loss of 'depth' is nan" in text


def refused(tmp_path, *outs):
    with pytest.raises(SystemExit) as error:
        main(["compare-report", *map(str, outs), "--to", str(tmp_path / "to")])
    assert not (tmp_path / "to").exists() and "\n" not in str(error.value)
    return str(error.value)


def test_what_cannot_be_read_is_one_error_that_names_the_file(tmp_path):
    folder = planted(tmp_path / "a")
    assert "a is named twice" in refused(tmp_path, folder.path, folder.path)
    path = folder.path / "runs" / "tm+te.seed-0.json"
    path.write_text(path.read_text()[:-20])
    assert f"{path} is no JSON" in refused(tmp_path, folder.path)
    assert "holds no experiment.json" in refused(tmp_path, tmp_path / "nothing")
    lone = compared(tmp_path / "b", {"tm+te": 1.0})
    edit(lone, tuned={"joint": {"lr": 1e-3}})
    assert "tuned has no tried rates for 'joint'" in refused(tmp_path, lone.path)
    edit(lone, tuned={}, arms={"tm+te": "tm+te"})
    for run in (lone.path / "runs").glob("joint*"):
        run.unlink()
    assert "has no arm 'joint'" in refused(tmp_path, lone.path)


def test_titles_are_told_apart_by_experiment_then_by_folder(tmp_path):
    paths = [compared(tmp_path / name / "x", {"tm+te": 1.0}, range(1)).path for name in ("a", "b")]
    assert list(found(*paths).settings) == [f"{TITLE} (a/x)", f"{TITLE} (b/x)"]
    edit(compared(tmp_path / "c", {"tm+te": 1.0}, range(1)), experiment="placement")
    assert list(found(paths[0], tmp_path / "c").settings) == [f"{TITLE} (pilot)", f"{TITLE} (placement)"]
