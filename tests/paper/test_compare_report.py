"""The page on placements and adapters: it finds what was planted, and says what it does not know."""

import json
import math
import re
import shlex
from argparse import ArgumentParser

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from scipy import stats

from benchmarks.paper.__main__ import main
from benchmarks.paper.compare import figures
from benchmarks.paper.compare.answer import answer
from benchmarks.paper.compare.chance import beaten, rank_by_chance, ratio_of_means, spread_within
from benchmarks.paper.compare.findings import find
from benchmarks.paper.compare.folders import METHOD, RANDOM, read_settings
from benchmarks.paper.compare.numbers import numbers
from benchmarks.paper.compare.page import page
from benchmarks.paper.compare.prediction import OVERALL, reached_by_chance
from benchmarks.paper.compare.questions import QUESTIONS, printed_pairs, printed_shares
from benchmarks.paper.runner.command import add_arguments
from tests.paper.compare_folders import BLOCKS, RANGE, compared, edit, one_block
from tests.paper.result_folders import TASKS, rows, section

T5 = 2.7764451  # of Student's t, 97.5 % at 4 degrees of freedom
NOISE = (-1.0, -0.5, 0.0, 0.5, 1.0)
SD = math.sqrt(0.625)  # of NOISE
TITLE = "rooms, small, 2 tasks"


def found(*paths):
    return find(read_settings(list(paths)))


def claim(findings, key):
    return next(one for one in findings.claims if one.key == key)


def noisy(mean, times=1.0):
    return [mean + times * value for value in NOISE]


def planted(path, **options):
    """Conflict gains 3 points over joint training, random plans 1, and rivals more or less."""
    gains = {
        "tm+te": noisy(3.0),
        "longer": noisy(2.95, 1.1),
        "random": noisy(1.5),
        "random-2": noisy(0.5),
        "reverse": noisy(5.0),
        "lora": noisy(3.0, 4.0),
        "bitfit": noisy(1.0),
    }
    return compared(path, gains, **options)


# ---- claims


def test_planted_differences_have_their_verdicts_and_intervals(tmp_path):
    findings = found(planted(tmp_path).path)
    one = claim(findings, "joint").evidence[0]
    assert one.estimate.mean == pytest.approx(3.0) and one.word == "holds" and one.sides == pytest.approx((0, 3))
    assert one.estimate.half_width == pytest.approx(T5 * SD / math.sqrt(5))
    random = claim(findings, "random").evidence[0]  # the mean over both plans at every seed, whose noise is the same
    assert random.estimate.mean == pytest.approx(2.0) and random.estimate.sd == pytest.approx(0, abs=1e-9)
    words = {c.key: c.evidence[0].word for c in findings.claims if c.evidence}
    assert words == {
        "joint": "holds",
        "longer": "no difference",
        "random-joint": "holds",
        "random": "holds",
        "reverse": "does not hold",
        "lora": "not settled",
        "bitfit": "holds",
    }
    assert claim(findings, "swap").untested == [TITLE]


def test_what_is_not_settled_says_how_many_seeds_would(tmp_path):
    findings = found(planted(tmp_path).path)
    lora = claim(findings, "lora").evidence[0]
    n = 2  # differences are 3 times NOISE around 0, so that half a point, the margin, is to be found
    while stats.t.ppf([0.975, 0.8], n - 1).sum() * 3 * SD / math.sqrt(n) > 0.5:
        n += 1
    assert lora.seeds == n and 150 < n < 200
    table = section(page(findings, []), "Claims")
    assert f"not settled: {int(lora.seeds)} seeds in all" in table


def test_one_seed_settles_nothing_and_has_no_interval(tmp_path):
    folder = compared(tmp_path, {"tm+te": 3.0, "random": 1.0}, seeds=range(1))
    findings = found(folder.path)
    one = claim(findings, "random").evidence[0]
    assert one.word == "not settled" and math.isnan(one.seeds) and one.estimate.mean == pytest.approx(2)
    text = page(findings, [])
    assert "not settled: one seed has no interval" in text and "is not settled against random blocks" in text
    assert not re.search(r"\bnan\b", text)
    assert numbers(findings)["claims"]["random"]["settings"][TITLE]["low"] is None


def test_seeds_are_paired_and_missing_ones_left_out(tmp_path):
    folder = compared(tmp_path, {"tm+te": noisy(3.0), "random": [9.0, None, 1.0, None, 2.0]})
    (folder.path / "runs" / "tm+te.seed-0.json").unlink()
    one = claim(found(folder.path), "random").evidence[0]
    assert one.by_seed == pytest.approx({2: 3.0 - 1.0, 4: 4.0 - 2.0})
    assert one.sides == pytest.approx((1.5, 3.5))


def test_gains_are_over_joint_training_though_there_are_single_task_runs(tmp_path):
    folder = compared(tmp_path, {"single": 0.0, "tm+te": noisy(3.0)})
    for path in (folder.path / "runs").glob("single*"):
        path.unlink()
    folder.single()
    setting = found(folder.path).settings[TITLE]
    assert setting.comparison.reference == "single"
    assert list(setting.arms[METHOD].delta_m.values()) == pytest.approx(noisy(3.0))


def test_paper_numbers_are_those_of_the_printed_tables():
    keys = {question.key: question for question in QUESTIONS}
    assert printed_shares() == pytest.approx({"NYUD-v2": 0.504, "PASCAL-Context": 0.689}, abs=1e-3)
    assert printed_pairs(keys["swap"]) == [("NYUD-v2, ViT-T", -2.608, 0.044)]
    assert printed_pairs(keys["longer"]) == []
    assert [where for where, *_ in printed_pairs(keys["imtl"])] == [
        f"Taskonomy, ViT-{size}" for size in ("B", "L", "S", "T")
    ]


def test_first_paragraph_follows_the_numbers(tmp_path):
    gains = {"tm+te": noisy(3.0), "random": noisy(1.0), "lora": noisy(1.0), "shared": noisy(5.0)}
    good = compared(tmp_path / "good", gains).path
    bad = compared(tmp_path / "bad", {"tm+te": noisy(1.0), "random": noisy(2.0)}).path
    text = answer(found(good, bad))
    assert f"beats chance in 1 of 2 settings ({TITLE} (good): +2.00 [+2.00, +2.00] points, 5 seeds)" in text
    assert "does worse than chance in 1 of 2 settings (rooms, small, 2 tasks (bad): -1.00" in text
    assert "(good): beats lora, loses to shared; rooms, small, 2 tasks (bad): not tested." in text
    assert "is not tested against longer joint training in 2 of 2 settings" in text


# ---- from one setting to another


def test_more_tasks_and_pretrained_weights(tmp_path):
    many = {**TASKS, "normals": TASKS["depth"]}
    few = compared(tmp_path / "a", {"tm+te": noisy(1.0)}, options={"tasks": list(TASKS)})
    more = compared(tmp_path / "b", {"tm+te": noisy(3.0)}, tasks=many, options={"tasks": list(many)})
    other = compared(tmp_path / "c", {"tm+te": noisy(9.0)}, tasks=many, options={"tasks": list(many)}, steps=7)
    for name, folder in (("/x/vit", few), ("untrained:/x/vit", other)):
        settings = json.loads((folder.path / "experiment.json").read_text())["settings"]
        edit(folder, settings=settings | {"backbone": name})
    findings = found(few.path, more.path, other.path)
    assert claim(findings, "tasks").evidence == [] == claim(findings, "pretrained").evidence
    settings = json.loads((few.path / "experiment.json").read_text())["settings"]
    edit(few, settings=settings | {"backbone": "small"})
    drawn = compared(tmp_path / "d", {"tm+te": noisy(1.0)}, options={"tasks": list(TASKS)})
    learnt = compared(tmp_path / "e", {"tm+te": noisy(2.0)}, options={"tasks": list(TASKS)})
    for name, folder in (("untrained:/x/vit", drawn), ("/x/vit", learnt)):
        settings = json.loads((folder.path / "experiment.json").read_text())["settings"]
        edit(folder, settings=settings | {"backbone": name})
    findings = found(few.path, more.path, drawn.path, learnt.path)
    tasks, pretrained = (claim(findings, key).evidence for key in ("tasks", "pretrained"))
    assert [one.estimate.mean for one in tasks] == pytest.approx([2.0])
    assert tasks[0].setting == "rooms, small, 2 tasks → rooms, small, 3 tasks"
    assert [one.estimate.mean for one in pretrained] == pytest.approx([1.0]) and pretrained[0].word == "holds"
    assert "/x" not in page(findings, [])


# ---- chance


def test_random_plans_are_pooled_by_seed_and_the_method_ranked_among_them(tmp_path):
    gains = {"tm+te": noisy(3.0), "random": [0, 1, 2, 3, 4], "random-2": [4, 4, 4, 4, None], "random-3": [9] * 5}
    findings = found(compared(tmp_path, gains).path)
    setting, one = findings.settings[TITLE], findings.chances[TITLE]
    assert list(setting.arms[RANDOM].delta_m.values()) == pytest.approx([13 / 3, 14 / 3, 5, 16 / 3, 6.5])
    assert {arm.name for arm in setting.shown} == {"joint", "tm+te", RANDOM}
    # by conflict: 2, 2.5, 3, 3.5, 4, so that a tie stands in the last place
    assert list(one.ranks.values()) == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1 / 3, 0.25], abs=0.01)
    assert one.plans == {0: 3, 1: 3, 2: 3, 3: 3, 4: 2}
    squares = [np.var(group) * len(group) for group in ([0, 4, 9], [1, 4, 9], [2, 4, 9], [3, 4, 9], [4, 9])]
    assert one.spread.value == pytest.approx(math.sqrt(sum(squares) / 9)) and one.spread.low < one.spread.value
    assert any("random plans, there are only 2 at seed 4" in note for note in findings.notes)


def test_rank_counts_ties_half_and_chance_is_around_one_half():
    assert beaten(2.0, [1.0, 2.0, 3.0, 0.0]) == pytest.approx(0.625)
    assert rank_by_chance([8]) == (0.0, 1.0)
    low, high = rank_by_chance([8] * 5)
    deviation = math.sqrt((8 + 2) / (12 * 8) / 5)  # of the mean of five uniform ranks 0, 1/8, ..., 1
    assert low == pytest.approx(0.5 - 1.96 * deviation, abs=0.03) and low + high == pytest.approx(1, abs=0.03)
    assert all(math.isnan(end) for end in rank_by_chance([]))
    assert math.isnan(spread_within([[1.0], [2.0]]).value)


def test_share_of_the_gain_by_fieller(tmp_path):
    top, bottom = np.array([1.0, 1.6, 0.8, 1.2, 0.9]), np.array([3.0, 2.5, 3.5, 3.2, 2.8])
    share = ratio_of_means(top, bottom)
    assert share.value == pytest.approx(top.mean() / bottom.mean())
    for end in (share.low, share.high):  # just where the difference stops being other than 0
        difference = top - end * bottom
        assert abs(difference.mean()) / (difference.std(ddof=1) / math.sqrt(5)) == pytest.approx(T5)
    assert math.isnan(ratio_of_means(top, bottom - 3).value)  # the gain's own interval holds 0
    assert math.isnan(ratio_of_means([1.0], [2.0]).value)
    gains = {"tm+te": bottom.tolist(), "random": top.tolist()}
    chance = found(compared(tmp_path, gains).path).chances[TITLE]
    assert chance.share == pytest.approx(share) and chance.has_gain


def test_there_is_no_share_of_no_gain(tmp_path):
    gains = {"tm+te": noisy(0.1), "random": noisy(0.5)}
    findings = found(compared(tmp_path, gains).path)
    assert not findings.chances[TITLE].has_gain and math.isnan(findings.chances[TITLE].share.value)
    table = rows(section(page(findings, []), "What chance alone reaches"))
    assert table[TITLE]["share of the gain %"] == "no gain to take a share of"


# ---- arms and costs


def test_arms_have_their_costs_and_holm_is_over_the_shown_arms(tmp_path):
    findings = found(planted(tmp_path).path)
    setting = findings.settings[TITLE]
    per = findings.costs[TITLE]
    assert per[METHOD].compute.mean == pytest.approx(3.0 / 2.5) and per[METHOD].cpu.mean == pytest.approx(3.0 / 1.5)
    assert per["lora"].compute.n == 0  # its runs do not say
    adjusted = {name: test.p for name, test in setting.against_joint.items()}
    p = {name: test.difference.p for name, test in setting.against_joint.items()}
    assert adjusted.keys() == {"tm+te", "longer", "reverse", "lora", "bitfit", RANDOM}
    assert adjusted["reverse"] == pytest.approx(6 * p["reverse"])
    assert RANDOM not in setting.against_random and "joint" not in setting.against_random
    table = rows(section(page(findings, []), f"Arms: {TITLE}"))
    assert table["tm+te"]["Δm over joint %"] == f"+3.00 ± {T5 * SD / math.sqrt(5):.2f}"
    assert table["tm+te"]["compute"] == "3.50" and table["tm+te"]["CPU × joint"] == "2.50"
    assert "per added compute, tm+te (+1.20" in page(findings, [])


def test_unequal_tuning_is_said_loudly(tmp_path):
    tried = {"0.001": 0.0, "0.003": 1.0, "0.009": None}
    tuned = {arm: {"lr": 1e-3, "tried": tried} for arm in ("joint", "tm+te", "lora")}
    gains = {"tm+te": noisy(1.0), "lora": noisy(0.5)}
    alike = found(compared(tmp_path / "a", gains, tuned=tuned).path)
    assert not alike.tunings[TITLE].warning and "chosen among 3 rates" in page(alike, [])
    tuned["lora"] = {"lr": 1e-3, "tried": {**tried, "0.027": 0.5}}
    other = found(compared(tmp_path / "b", gains, tuned=tuned).path)
    assert "ARMS WERE NOT TUNED ALIKE: lora at 4; joint, tm+te at 3 learning rates" in page(other, [])
    assert other.notes[0].startswith(f"{TITLE}: ARMS WERE NOT TUNED ALIKE")
    assert found(compared(tmp_path / "c", gains).path).tunings[TITLE].warning == ""


def test_different_rates_that_nobody_tuned_are_said(tmp_path):
    folder = compared(tmp_path, {"tm+te": noisy(1.0)})
    folder.run("tm+te", 0, 1.0, settings={"lr": 5e-5, "steps": 100})
    assert "ARMS HAVE DIFFERENT LEARNING RATES" in found(folder.path).notes[0]


# ---- prediction


def test_gains_that_follow_the_rates_are_predicted(tmp_path):
    def gain(kind, block, seed):
        return (block if kind == "tm" else -block) + 0.3 * math.sin(7 * seed + block)

    findings = found(one_block(tmp_path, gain, range(6)).path)
    tm, te = (findings.predictions[TITLE][kind] for kind in ("tm", "te"))
    assert tm.correlations["range"][OVERALL].of_means.value == pytest.approx(1)
    assert tm.correlations["gains"][OVERALL].of_means.value == pytest.approx(-1)
    assert tm.correlations["gradient_norms"][OVERALL].of_means.value == 0  # all the same
    assert te.correlations["depth"]["semseg"].of_means.value == pytest.approx(-1)
    assert te.correlations["null"][OVERALL].word(BLOCKS) in ("holds", "not settled")
    assert tm.gains[OVERALL].shape == (6, BLOCKS)
    assert tm.gains[OVERALL][2, 3] == pytest.approx(gain("tm", 3, 2))
    assert tm.common.value > 0.9 and tm.most.value > 0.95
    text = section(page(findings, []), f"Prediction: {TITLE}")
    assert rows(text)["5"]["range rate"] == "60.0 [60.0, 60.0]"


def test_one_seeds_correlations_are_those_of_its_blocks(tmp_path):
    order = {0: (5, 3, 4, 1, 2, 0), 1: (0, 1, 2, 3, 5, 4), 2: (0, 2, 1, 3, 4, 5)}
    folder = one_block(tmp_path, lambda kind, block, seed: float(order[seed][block]), range(3), kinds=("tm",))
    one = found(folder.path).predictions[TITLE]["tm"].correlations["range"][OVERALL]
    expected = [1 - 6 * sum((r - b) ** 2 for b, r in enumerate(ranks)) / (6 * 35) for ranks in order.values()]
    assert list(one.by_seed.values()) == pytest.approx(expected)
    assert one.mean.value == pytest.approx(np.mean(expected)) and math.isnan(one.of_means.low)
    assert one.best == one.mean and one.word(BLOCKS) == "not settled"


def test_the_jackknife_over_seeds_is_that_of_the_means(tmp_path):
    rng = np.random.default_rng(1)
    gains = rng.normal(size=(5, BLOCKS)) + np.arange(BLOCKS)
    folder = one_block(tmp_path, lambda kind, block, seed: gains[seed, block], kinds=("te",))
    one = found(folder.path).predictions[TITLE]["te"].correlations["depth"][OVERALL].of_means

    def rho(values):
        ranks = np.argsort(np.argsort(values.mean(0)))
        return 1 - 6 * ((ranks - np.arange(BLOCKS)) ** 2).sum() / (BLOCKS * (BLOCKS**2 - 1))

    left = [rho(np.delete(gains, i, 0)) for i in range(5)]
    half = T5 * math.sqrt(4 / 5 * ((np.array(left) - np.mean(left)) ** 2).sum())
    assert one.value == pytest.approx(rho(gains))
    assert (one.low, one.high) == pytest.approx((max(-1, rho(gains) - half), min(1, rho(gains) + half)))


def test_noise_is_no_reproducible_gain_and_missing_blocks_leave_out_their_seed(tmp_path):
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(5, BLOCKS))
    folder = one_block(tmp_path, lambda kind, block, seed: noise[seed, block], kinds=("tm",))
    (folder.path / "runs" / "tm-at-3.seed-1.json").unlink()
    findings = found(folder.path)
    one = findings.predictions[TITLE]["tm"]
    assert one.seeds == (0, 2, 3, 4) and one.left_out == (1,)
    values = noise[[0, 2, 3, 4]]
    between = 4 * values.mean(0).var(ddof=1)
    rest = values - values.mean(0) - values.mean(1, keepdims=True) + values.mean()
    within = (rest**2).sum() / 15
    assert one.common.value == pytest.approx((between - within) / (between + 3 * within))
    assert one.common.low < 0.2
    assert "Seeds 1 lack a block" in page(findings, [])


def test_what_random_orders_reach():
    assert reached_by_chance(6) == pytest.approx(0.886, abs=1e-3)  # the tables' two-sided 5 %
    assert reached_by_chance(12) == pytest.approx(0.587, abs=0.01)
    assert reached_by_chance(4) == math.inf


# ---- the page, its numbers, and what is refused


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
    assert len(RANGE) == BLOCKS
