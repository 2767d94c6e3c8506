"""Groups of tasks: their plans, and what an expanded model makes of them."""

import json

import pytest

import dtme

TASKS = ("a", "b", "c", "d")
WIDTHS = {f"b{i}": 8 for i in range(4)}
GROUPS = {"near": ("a", "b")}


def plan_of(**fields):
    return dtme.ExpansionPlan(**{"tasks": TASKS, "num_tokens": 2, "num_features": WIDTHS, "groups": GROUPS} | fields)


def test_a_groups_name_stands_for_its_tasks():
    plan = plan_of(modulation={"b1": ["d", "near"]}, expansion={"b2": ["b", "a"], "b3": ("near",), "b0": ()})
    assert plan.modulation == {"b1": ("a", "b", "d")}  # in the order of the plan's tasks
    assert plan.expansion == {"b2": ("a", "b"), "b3": ("a", "b")}
    assert plan.groups == GROUPS and [plan.owner(task) for task in TASKS] == ["near", "near", "c", "d"]
    assert plan.added_parameters() == 2 * (2 * 8) + 2 * (2 * 8)  # near and d are modulated, near is expanded twice


def test_a_group_may_have_the_name_of_one_of_its_tasks():
    plan = plan_of(groups={"b": ("a", "b")}, modulation={"b1": ["b"]}, expansion={"b1": ["b", "a"]})
    assert plan.modulation == plan.expansion == {"b1": ("a", "b")}
    assert dtme.ExpansionPlan(**plan.as_dict()) == plan


def test_saved_plans_hold_the_names_of_groups(tmp_path):
    plan = plan_of(modulation={"b1": ["near", "d"]}, expansion={"b2": TASKS})
    plan.save(path := tmp_path / "plan.json")
    content = json.loads(path.read_text())
    assert content["modulation"] == {"b1": ["near", "d"]} and content["expansion"] == {"b2": ["near", "c", "d"]}
    assert content["groups"] == {"near": ["a", "b"]}
    assert dtme.ExpansionPlan.load(path) == plan
    content["expansion"] = {"b2": list(TASKS)}  # by hand, by the names of tasks
    path.write_text(json.dumps(content))
    assert dtme.ExpansionPlan.load(path) == plan


def test_plans_without_groups_are_saved_as_before(tmp_path):
    plan_of(groups={}, modulation={"b1": ["a"]}).save(path := tmp_path / "plan.json")
    fields = ["format", "version", "tasks", "num_tokens", "modulation", "expansion", "num_features"]
    assert list(json.loads(path.read_text())) == fields


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"groups": {"g": ["a", "b"], "h": ["b"]}}, "overlap: task 'b' is in both 'g' and 'h'"),
        ({"groups": {"c": ["a", "b"]}}, r"groups\['c'\] has the name of a task that is not in it"),
        ({"groups": {"x.y": ["a"]}}, "a group name must be a non-empty string without dots, got 'x.y'"),
        ({"groups": {"keys": ["a"]}}, "the group name 'keys' is taken"),
        ({"groups": {"g": []}}, r"groups\['g'\] must be a non-empty sequence"),
        ({"groups": {"g": "ab"}}, r"groups\['g'\] must be a non-empty sequence"),
        ({"groups": {"g": ["a", "z"]}}, r"groups\['g'\] names the unknown task 'z'"),
        ({"groups": {"g": ["a", "a"]}}, r"groups\['g'\] names a task twice"),
        ({"groups": ["g"]}, "groups must map"),
        ({"modulation": {"b1": ["d", "b"]}}, r"modulation\['b1'\] .* group 'near', .* leaves out 'a'"),
        ({"expansion": {"b1": ["near", "b"]}}, r"expansion\['b1'\] names a task twice"),
        ({"expansion": {"b1": ["far"]}}, r"unknown task 'far'; tasks are .*, groups are \['near'\]"),
    ],
)
def test_groups_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        plan_of(**fields)


def test_compute_counts_streams_block_by_block():
    plan = plan_of(modulation={"b1": ["near", "d"]}, expansion={"b3": ["near", "c"]})
    assert plan.compute() == (1 + 3 + 3 + 3) / 4  # c goes on in the shared stream, alone
    assert plan.compute(["a", "b"]) == plan.compute("d") == 1.0
    assert plan.compute(["c", "a"]) == (1 + 2 + 2 + 2) / 4
    ungrouped = plan_of(groups={}, modulation={"b1": ["a", "b"]})
    assert ungrouped.compute() == (1 + 3 + 3 + 3) / 4  # c and d share
    assert plan_of().compute() == 1.0


def test_compute_of_plans_that_do_not_know_their_blocks():
    with pytest.raises(ValueError, match="num_features are empty"):
        plan_of(num_features={}).compute()
    with pytest.raises(ValueError, match="changes block 'b9', which its num_features leave out"):
        plan_of(modulation={"b9": ["c"]}).compute()
    with pytest.raises(ValueError, match="unknown task 'near'"):
        plan_of().compute("near")
