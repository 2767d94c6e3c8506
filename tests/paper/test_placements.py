"""Every placement of modulations and task tokens is the one it is called, and the model it makes trains."""

import copy
import json
import pickle

import pytest
import torch

import dtme
from benchmarks.paper.structures import ABLATIONS, ARMS, METHOD, PLACES, Placement
from tests.paper.small import NAMES, backward, batches, small_model, small_setting

OURS = {**METHOD, **PLACES, **ABLATIONS, "shared": ARMS["shared"]}
DIFFERENT = [name for name in OURS if not name.startswith("after-")]
BLOCKS = [f"layers.{d}" for d in range(6)]


class Unread:
    """A loader that nobody may read."""

    def __iter__(self):
        raise AssertionError("the batches were read")


class Counted:
    def __init__(self):
        self.times = 0

    def __iter__(self):
        self.times += 1
        return iter(batches())


@pytest.fixture(scope="module")
def report():
    return small_setting().report


def setting(report, **options):
    """One whose report was read before."""
    made = small_setting(Unread(), **options)
    made.report = report
    return made


@pytest.mark.parametrize("name", DIFFERENT)
def test_every_arm_trains_all_that_it_says_and_survives_a_pickle(name, report):
    plain = small_model()
    before = {id_ for id_, _ in plain.named_parameters()}
    model, facts = OURS[name].structure().apply(setting(report))
    json.dumps(facts, allow_nan=False)
    added = {id_: p for id_, p in model.named_parameters() if id_ not in before}
    assert sum(p.numel() for p in added.values()) == facts["added"] > 0
    assert dtme.ExpansionPlan(**facts["plan"]).added_parameters() == facts["added"]
    backward(model.train())
    for id_, parameter in model.named_parameters():
        frozen = name == "frozen" and id_ in before and id_.startswith("backbone")
        assert (parameter.grad is None) == frozen and parameter.requires_grad != frozen, id_
        if not frozen and not id_.endswith("k_proj.bias"):  # which no score depends on
            assert parameter.grad.isfinite().all() and parameter.grad.any(), id_
    x, _ = batches()[1]
    again = pickle.loads(pickle.dumps(model)).eval()(x)
    for task, prediction in model.eval()(x).items():
        assert torch.equal(again[task], prediction)


@pytest.mark.parametrize("name", ["tm", "shared"])
def test_modulation_starts_as_the_plain_model(name, report):
    arm = OURS[name].structure()
    placement = Placement(expansion=0, shared=arm.shared)
    x, _ = batches()[0]
    want = small_model().eval()(x)
    model, _ = placement.apply(setting(report))
    for task, prediction in model.eval()(x).items():
        torch.testing.assert_close(prediction, want[task], atol=1e-5, rtol=1e-5)


def chosen(name, report, **options):
    _, facts = OURS[name].structure().apply(setting(report, **options))
    return facts["plan"]["modulation"], facts["plan"]["expansion"]


def test_arms_by_rates_are_those_of_the_report(report):
    report = report.at(100)
    plans = {
        "tm": report.plan(expansion=0),
        "te": report.plan(modulation=0),
        "tm+te": report.plan(),
        "gains": report.plan(strategy="gain"),
        "pairs": report.plan(strategy="pairs"),
        "reverse": report.plan(strategy="reverse"),
        "swap": report.plan(strategy="swap"),
        "t-1": report.plan(num_tokens=1),
        "share-25": report.plan(modulation=0.25, expansion=0.25),
        "share-75": report.plan(modulation=0.75, expansion=0.75),
        **{f"r-{r}": report.at(r).plan() for r in (1, 10, 500, 1000)},
    }
    for name, plan in plans.items():
        _, facts = OURS[name].structure().apply(setting(report))
        assert facts["plan"] == plan.as_dict(), name
        assert facts["report"]["ratio"] == (float(name[2:]) if name.startswith("r-") else 100)
    assert set(plans["tm+te"].modulation).isdisjoint(plans["reverse"].modulation)
    assert len(plans["share-25"].modulation) == 2 and len(plans["share-75"].expansion) == 4


def test_arms_without_rates_read_no_batch_and_are_what_they_are_called():
    def of(name, **options):
        _, facts = OURS[name].structure().apply(small_setting(Unread(), **options))
        return [list(facts["plan"][kind]) for kind in ("modulation", "expansion")]

    assert of("first-half") == [BLOCKS[:3]] * 2
    assert of("last-half") == [BLOCKS[3:]] * 2
    assert of("all") == [BLOCKS] * 2
    assert of("last-half", modulation=1 / 3, expansion=0) == [BLOCKS[4:], []]
    draws = [of("random", seed=seed) for seed in range(20)]
    assert draws[3] == of("random", seed=3)
    for kind in (0, 1):
        assert all(len(draw[kind]) == 3 for draw in draws)
        assert {block for draw in draws for block in draw[kind]} == set(BLOCKS)
    assert any(draw[0] != draw[1] for draw in draws)  # modulations and tokens are drawn independently


def test_the_report_is_read_once_whoever_asks():
    loader = Counted()
    made = small_setting(loader)
    reads = []
    for name in ("tm+te", "r-1000", "reverse"):
        Placement.plan(OURS[name].structure(), made)
        reads.append(loader.times)
    assert reads[0] == reads[-1] > 0


def test_shared_modules_are_one_set_in_the_blocks_of_ours(report):
    ours, facts = (OURS[name].structure().apply(setting(report))[1] for name in ("tm+te", "shared"))
    assert len(NAMES) * facts["added"] == ours["added"]
    for kind in ("modulation", "expansion"):
        assert facts["plan"][kind].keys() == ours["plan"][kind].keys()
        assert {tuple(owners) for owners in facts["plan"][kind].values()} == {("all",)}
    assert facts["compute"] == 1 < ours["compute"]


def test_a_group_of_all_tasks_has_a_name_of_its_own(report):
    tasks = ("all", "all_tasks")
    plan = dtme.ExpansionPlan(tasks)
    made = small_setting(Unread())
    made.model = dtme.MultiTaskModel(made.model.backbone, {task: torch.nn.Identity() for task in tasks})
    made.tasks = dict.fromkeys(tasks, made.tasks["depth"])
    plan, _ = Placement(strategy="first", shared=True).plan(made)
    assert plan.groups == {"all_tasks_tasks": tasks}


def test_batch_norm_and_tokens_are_what_was_asked_for(report):
    model, facts = OURS["batch-norm"].structure().apply(setting(report))
    assert any(".dtme.running_mean" in name or "running" in name for name, _ in model.backbone.named_buffers())
    assert facts["modulator"] == "batch_norm"
    model, facts = OURS["t-1"].structure().apply(setting(report, num_tokens=4))
    assert {p.shape[0] for n, p in model.named_parameters() if ".dtme.tokens." in n} == {1}
    model, facts = OURS["te"].structure().apply(setting(report, num_tokens=4))
    assert {p.shape[0] for n, p in model.named_parameters() if ".dtme.tokens." in n} == {4}


def test_the_model_that_is_compared_is_expanded_when_the_arm_says():
    assert [ARMS[f"after-{p}"].start for p in (0, 25, 50, 75)] == [0, 0.25, 0.5, 0.75]
    assert ARMS["tm+te"].start is None


def test_arms_are_pickled_as_they_stand_and_named_as_files_can_be():
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-+") for name in ARMS)
    assert len({arm.title for arm in ARMS.values()}) == len(ARMS)
    again = pickle.loads(pickle.dumps(ARMS))
    assert again["share-25"].structure() == copy.copy(ARMS["share-25"].structure()) == Placement(0.25, 0.25)


def test_wrong_options_are_named():
    with pytest.raises(ValueError, match=r"strategy must be one of conflict.*got 'best'"):
        Placement(strategy="best")
    with pytest.raises(ValueError, match=r"expansion must be a share of the blocks in \[0, 1\], got 50"):
        Placement(expansion=50, strategy="first").apply(small_setting(Unread()))
