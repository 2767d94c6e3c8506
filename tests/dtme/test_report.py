"""The report and the plan: selection rules, counts of parameters, files, table and picture."""

import dataclasses
import json

import pytest
import torch

import dtme

TASKS = ("semseg", "depth", "normals", "edges")


def make_report(range_rates=(0.1, 0.4, 0.4, 0.3), null_rates=(0.5, 0.2, 0.6, 0.5), valid=1000, width=8):
    """Every pair of tasks has the block's rate, except that semseg and depth conflict twice as often."""
    num_blocks, num_tasks = len(range_rates), len(TASKS)
    off = (1 - torch.eye(num_tasks)).long()
    valid_counts = off * valid * torch.ones(num_blocks, 1, 1, dtype=torch.int64)
    counts = []
    for rates in (range_rates, null_rates):
        per_block = torch.stack([off * round(rate * valid) for rate in rates])
        per_block[:, 0, 1] = per_block[:, 1, 0] = (2 * per_block[:, 0, 1]).clamp(max=valid)
        counts.append(per_block)
    return dtme.ConflictReport(
        tasks=TASKS,
        blocks=tuple(f"encoder.layer.{d}" for d in range(num_blocks)),
        ranks=torch.arange(1, num_blocks + 1),
        range_counts=counts[0],
        null_counts=counts[1],
        valid_counts=valid_counts,
        eigenvalues=torch.rand(num_blocks, width, dtype=torch.float64).sort(descending=True).values / 3,
        num_samples=17,
    )


def blocks(chosen):
    return [int(name.split(".")[-1]) for name in chosen]


def test_rates_are_sums_over_pairs():
    report = make_report()
    # five pairs at the rate, one at twice the rate
    torch.testing.assert_close(report.range_rates, torch.tensor([0.1, 0.4, 0.4, 0.3], dtype=torch.float64) * 7 / 6)
    assert make_report(valid=0).range_rates.isnan().all()


@pytest.mark.parametrize(
    ("strategy", "modulated", "expanded"),
    [
        ("conflict", [1, 2], [0, 2]),  # ties go to the earlier block
        ("reverse", [0, 3], [0, 1]),
        ("swap", [0, 2], [1, 2]),
    ],
)
def test_strategies_choose_by_rate(strategy, modulated, expanded):
    plan = make_report().plan(strategy=strategy)
    assert blocks(plan.modulation) == modulated and blocks(plan.expansion) == expanded
    assert all(tasks == TASKS for tasks in plan.modulation.values())


def test_random_strategy_repeats_with_its_seed_and_varies_with_it():
    report = make_report(range_rates=[0.1] * 12, null_rates=[0.1] * 12)
    plans = [report.plan(strategy="random", seed=seed) for seed in range(20)]
    assert plans[3] == report.plan(strategy="random", seed=3)
    assert all(len(p.modulation) == 6 == len(p.expansion) for p in plans)
    assert len({tuple(p.modulation) for p in plans}) > 15
    assert any(tuple(p.modulation) != tuple(p.expansion) for p in plans)


@pytest.mark.parametrize(("share", "count"), [(0, 0), (0.01, 1), (0.25, 1), (0.5, 2), (0.7, 3), (1, 4), (1.0, 4)])
def test_share_of_blocks(share, count):
    plan = make_report().plan(modulation=share, expansion=0)
    assert len(plan.modulation) == count and not plan.expansion


def test_blocks_that_fewer_than_two_tasks_reach_are_shown_and_not_planned_for(tmp_path):
    report = make_report()
    report.valid_counts[1] = report.range_counts[1] = report.null_counts[1] = 0
    assert blocks(report.shared_blocks) == [0, 2, 3] and report.range_rates[1].isnan()
    for strategy, modulated in (("conflict", [2, 3]), ("reverse", [0, 3]), ("swap", [0, 2])):
        plan = report.plan(modulation=0.6, strategy=strategy)
        assert blocks(plan.modulation) == modulated  # two of three, not two of four
        assert blocks(plan.num_features) == [0, 2, 3]
    drawn = [report.plan(modulation=0.3, expansion=1, strategy="random", seed=seed) for seed in range(9)]
    assert {tuple(blocks(plan.modulation)) for plan in drawn} == {(0,), (2,), (3,)}
    assert all(blocks(plan.expansion) == [0, 2, 3] for plan in drawn)
    for table in (str(report), report.table()):
        (row,) = [line for line in table.splitlines() if "encoder.layer.1" in line]
        assert row.split(None, 5)[3:] == ["-", "-", "fewer than two tasks reach it"] and "nan" not in table
    assert "of the 3 blocks (of 4) that two or more tasks reach" in str(report)
    report.plot(tmp_path / "conflicts.svg")
    report.save(tmp_path / "report.json")
    assert dtme.ConflictReport.load(tmp_path / "report.json").plan() == report.plan()


def test_a_report_without_shared_blocks_plans_nothing():
    report = make_report()
    for counts in (report.valid_counts, report.range_counts, report.null_counts):
        counts.zero_()
    plan = report.plan(modulation=1, expansion=1)
    assert not plan.modulation and not plan.expansion and not plan.num_features
    assert plan.compute() == 1 and report.plan(max_compute=1, max_parameters=0) == plan
    with pytest.raises(ValueError, match="below every plan"):
        report.plan(max_compute=0.9)
    assert "of the 0 blocks (of 4) that two or more tasks reach" in str(report)
    assert str(report).count("fewer than two tasks reach it") == 4


def test_tasks_that_reach_a_block_but_never_met_there_are_not_said_to_miss_it():
    report = make_report()
    for counts in (report.valid_counts, report.range_counts, report.null_counts):
        counts[1:3] = 0
    reached = torch.ones(4, 4, dtype=torch.bool)
    reached[2, 1:] = False
    report = dataclasses.replace(report, reached=reached)
    rows = {line.split()[0]: line for line in str(report).splitlines() if line.startswith("encoder.layer")}
    assert rows["encoder.layer.1"].endswith("no two tasks have gradients at the same token")
    assert rows["encoder.layer.2"].endswith("fewer than two tasks reach it")
    assert "the 2 blocks (of 4) where two or more tasks have gradients at the same token" in str(report)


def test_pair_threshold_keeps_tasks_of_some_pair_that_reaches_it():
    plan = make_report().plan(modulation=1.0, expansion=1.0, pair_threshold=0.5)
    # range: only semseg and depth reach 0.5, in blocks 1-3; null: everybody does, but nobody in block 1
    assert plan.modulation == {f"encoder.layer.{d}": ("semseg", "depth") for d in (1, 2, 3)}
    assert plan.expansion == {f"encoder.layer.{d}": TASKS for d in (0, 2, 3)}


def test_paper_counts_of_added_parameters():
    """ViT-T, six of twelve blocks each, one token: 0.243 % and 0.304 % of encoder and 1×1 heads (Table 1)."""
    names = [f"blocks.{d}" for d in range(12)]
    for num_tasks, added in ((4, 13_824), (5, 17_280)):
        tasks = tuple(f"task{i}" for i in range(num_tasks))
        plan = dtme.ExpansionPlan(tasks, 1, dict.fromkeys(names[:6], tasks), dict.fromkeys(names[3:9], tasks))
        assert plan.added_parameters(192) == plan.added_parameters(dict.fromkeys(names, 192)) == added
    text, params = (make_report().plan(num_tokens=preset) for preset in ("text", "params"))
    assert (text.num_tokens, params.num_tokens) == (6, 1)
    assert text.added_parameters() == 4 * 2 * (2 * 8) + 4 * 2 * (6 * 8)
    assert text.added_parameters(8) == text.added_parameters([8] * 4) == text.added_parameters()


@pytest.mark.parametrize(
    ("image_size", "channels", "added", "percent"),
    [((448, 576), (40, 1, 3, 1), 13_824, 0.243), ((512, 512), (21, 7, 2, 3, 1), 17_280, 0.304)],
    ids=["NYUD-v2", "PASCAL-Context"],
)
def test_vit_tiny_grows_by_what_the_paper_prints(image_size, channels, added, percent):
    """12 blocks of 192 channels and a 1×1 head a task: 5.689 M parameters on NYUD-v2."""
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768, image_size=image_size
    )
    heads = {f"task{i}": torch.nn.Conv2d(192, c, 1) for i, c in enumerate(channels)}
    model = dtme.MultiTaskModel(ViTModel(config, add_pooling_layer=False), heads)
    before = sum(p.numel() for p in model.parameters())
    names, tasks = [f"layers.{d}" for d in range(12)], tuple(heads)
    plan = dtme.ExpansionPlan(tasks, 1, dict.fromkeys(names[6:], tasks), dict.fromkeys(names[:6], tasks))
    dtme.expand(model, plan)
    assert sum(p.numel() for p in model.parameters()) - before == added == plan.added_parameters(192)
    assert round(100 * added / before, 3) == percent


def test_report_and_plan_survive_their_files_exactly(tmp_path):
    report = make_report()
    report.save(tmp_path / "report.json")
    again = dtme.ConflictReport.load(tmp_path / "report.json")
    assert (again.tasks, again.blocks, again.num_samples, again.ratio) == (report.tasks, report.blocks, 17, 100.0)
    for name in ("ranks", "range_counts", "null_counts", "valid_counts", "eigenvalues"):
        assert torch.equal(getattr(again, name), getattr(report, name))
    plan = report.plan(pair_threshold=0.5, num_tokens=3)
    plan.save(tmp_path / "deep" / "plan.json")
    assert dtme.ExpansionPlan.load(tmp_path / "deep" / "plan.json") == plan
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "report.json"]


def test_plan_file_may_be_edited_by_hand(tmp_path):
    path = tmp_path / "plan.json"
    make_report().plan().save(path)
    content = json.loads(path.read_text())
    content["expansion"] = {"encoder.layer.3": ["edges"]}
    del content["num_features"]
    path.write_text(json.dumps(content))
    assert dtme.ExpansionPlan.load(path).expansion == {"encoder.layer.3": ("edges",)}


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda c: "not json", "not valid JSON"),
        (lambda c: [], "not a dtme.ExpansionPlan file"),
        (lambda c: c | {"format": "other"}, "not a dtme.ExpansionPlan file"),
        (lambda c: c | {"version": 2}, "version 2"),
        (lambda c: {k: v for k, v in c.items() if k != "tasks"}, "lacks the field 'tasks'"),
        (lambda c: c | {"extra": 1}, "unknown field 'extra'"),
        (lambda c: c | {"num_tokens": 0}, "num_tokens must be"),
        (lambda c: c | {"num_tokens": 1.5}, "num_tokens must be"),
        (
            lambda c: c | {"modulation": {"encoder.layer.0": ["pose"]}},
            r"modulation\['encoder.layer.0'\] names .* 'pose'",
        ),
        (lambda c: c | {"modulation": {"encoder.layer.0": "depth"}}, "must be a sequence of task names"),
        (lambda c: c | {"expansion": {"encoder.layer.0": ["depth", "depth"]}}, "names a task twice"),
        (lambda c: c | {"expansion": ["encoder.layer.0"]}, "expansion must map"),
        (lambda c: c | {"num_features": {"encoder.layer.0": -8}}, "num_features"),
        (lambda c: c | {"tasks": []}, "non-empty sequence"),
        (lambda c: c | {"tasks": [*TASKS, "a.b"]}, "without dots"),
    ],
)
def test_damaged_plan_files_name_the_file_and_the_field(tmp_path, edit, says):
    path = tmp_path / "plan.json"
    make_report().plan().save(path)
    edited = edit(json.loads(path.read_text()))
    path.write_text(edited if isinstance(edited, str) else json.dumps(edited))
    with pytest.raises(ValueError, match=says) as error:
        dtme.ExpansionPlan.load(path)
    assert "plan.json" in str(error.value)


@pytest.mark.parametrize(
    "edit",
    [
        lambda c: c | {"ranks": [1]},
        lambda c: c | {"valid_counts": c["valid_counts"][:1]},
        lambda c: c | {"range_counts": "many"},
        lambda c: c | {"eigenvalues": c["eigenvalues"][:2]},
        lambda c: c | {"tasks": ["a", "a"]},
        lambda c: c | {"ranks": [1.5, 2, 3, 4]},
        lambda c: c | {"ranks": [0, 2, 3, 4]},
        lambda c: c | {"ranks": [1, 2, 3, 99]},
        lambda c: c | {"blocks": "abcd"[:2] * 2},
        lambda c: c | {"num_samples": "x"},
        lambda c: c | {"ratio": -1},
        lambda c: c | {"eigenvalues": [[1.0]] * 4},
        lambda c: c | {"range_counts": [[[1] * 4] * 4] * 4},
        lambda c: c | {"valid_counts": [[[0] * 4] * 4] * 4},
    ],
)
def test_damaged_report_files_are_refused(tmp_path, edit):
    path = tmp_path / "report.json"
    make_report().save(path)
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=r"report.json is damaged"):
        dtme.ConflictReport.load(path)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"modulation": 1.5}, "modulation must be a share"),
        ({"expansion": -0.1}, "expansion must be a share"),
        ({"expansion": float("nan")}, "expansion must be a share"),
        ({"modulation": True}, "modulation must be a share"),
        ({"strategy": "best"}, "strategy must be one of"),
        ({"num_tokens": "some"}, "num_tokens must be"),
        ({"num_tokens": 0}, "num_tokens must be"),
        ({"num_tokens": 2.5}, r"num_tokens must be an integer of at least 1, got 2\.5"),
        ({"seed": [1]}, r"seed must be an integer, got \[1\]"),
        ({"strategy": "random", "seed": "x"}, "seed must be an integer, got 'x'"),
        ({"strategy": "random", "seed": None}, "seed must be an integer, got None"),
        ({"seed": True}, "seed must be an integer"),
        ({"pair_threshold": float("nan")}, "pair_threshold must be"),
    ],
)
def test_bad_plan_options(options, says):
    for ask in (make_report().plan, make_report().stability):
        with pytest.raises(ValueError, match=says):
            ask(**options)


@pytest.mark.parametrize("tasks", [("",), ("a.b",), ("a", "a"), (), ("keys",), ("type",), ("training",), (3,), "depth"])
def test_task_names_must_be_able_to_name_parameters(tasks):
    with pytest.raises(ValueError, match="task"):
        dtme.ExpansionPlan(tasks)
    if not isinstance(tasks, str):
        with pytest.raises(ValueError, match="task"):
            dtme.MultiTaskModel(
                torch.nn.Linear(2, 2),
                {task: torch.nn.Linear(2, 2) for task in tasks} if len(set(tasks)) == len(tasks) else {},
            )


def test_plans_are_frozen_and_tell_missing_widths():
    plan = dtme.ExpansionPlan(TASKS, 2, {"a": TASKS}, {"b": ("depth",)})
    with pytest.raises(AttributeError):
        plan.num_tokens = 3
    with pytest.raises(ValueError, match="no width for block 'a'"):
        plan.added_parameters()
    for wrong, error in ((-1, ValueError), (True, ValueError), ({"a": 10, "b": "4"}, ValueError), (10.5, TypeError)):
        with pytest.raises(error, match="num_features"):
            plan.added_parameters(wrong)
    with pytest.raises(ValueError, match="one width for each of 2 blocks"):
        plan.added_parameters([8])
    assert plan.added_parameters({"a": 10, "b": 4}) == 4 * 2 * 10 + 2 * 4


def test_table_has_a_row_a_block_with_rates_and_what_the_plan_puts_there():
    report = make_report()
    lines = str(report).splitlines()
    rows = {line.split()[0]: line for line in lines if line.startswith("encoder.layer")}
    assert len(rows) == 4
    assert rows["encoder.layer.2"].split()[1:5] == ["8", "3", "46.7%", "66.7%"]
    assert rows["encoder.layer.2"].endswith("modulate + expand") and rows["encoder.layer.1"].endswith("modulate")
    assert "modulate (semseg, depth)" in report.table(report.plan(pair_threshold=0.5))
    assert "plan" not in report.table()


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot_writes_a_picture(tmp_path, suffix):
    path = tmp_path / f"conflicts.{suffix}"
    make_report().plot(path)
    assert path.stat().st_size > 5000 and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("strategy, taken", [("first", [0, 1]), ("last", [2, 3])])
def test_strategies_by_place_look_at_no_rates(strategy, taken):
    for rates in ([0.1, 0.2, 0.3, 0.4], [0.4, 0.1, 0.3, 0.2]):
        report = make_report(range_rates=rates, null_rates=rates[::-1])
        plan = report.plan(strategy=strategy)
        assert blocks(plan.modulation) == blocks(plan.expansion) == taken
        one = report.plan(strategy=strategy, max_parameters=plan.added_parameters() // 2)
        end = taken[0] if strategy == "first" else taken[-1]
        assert 0 < one.added_parameters() <= plan.added_parameters() // 2 and end in blocks(one.blocks)
    assert plan.compute() == {"first": 4.0, "last": 2.5}[strategy]


def test_a_random_plan_is_drawn_whatever_the_rates_are():
    one, other = ([0.1, 0.2, 0.3, 0.4], [0.4, 0.1, 0.3, 0.2])
    plans = [make_report(range_rates=rates, null_rates=rates).plan(strategy="random", seed=3) for rates in (one, other)]
    assert plans[0] == plans[1]
