"""Groups of tasks: their plans, and what an expanded model makes of them."""

import copy
import json

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import dtme
from dtme.blocks import find_blocks
from tests.dtme.backbones import Mixing
from tests.dtme.clients import WIDTH, OwnTransformer, Two, concatenated, same_predictions

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
    assert plan_of(num_features={}).compute() == 1  # it changes nothing
    with pytest.raises(ValueError, match="num_features are empty"):
        plan_of(num_features={}, modulation={"b1": ["c"]}).compute()
    with pytest.raises(ValueError, match="changes block 'b9', which its num_features leave out"):
        plan_of(modulation={"b9": ["c"]}).compute()
    with pytest.raises(ValueError, match="unknown task 'near'"):
        plan_of().compute("near")


# --- expanded by one --------------------------------------------------------------------------------------------------

MANY = tuple(f"t{i}" for i in range(6))
MIXED = {"odd": ("t1", "t3"), "even": ("t4", "t0")}
"""Of interleaved tasks; t2 has modules of its own, t5 has none."""


def mixed_plan(model):
    first, second, third = find_blocks(model.backbone)
    widths = dict.fromkeys((first, second, third), WIDTH)
    modulation = {first: ["odd"], second: ["odd", "even", "t2"]}
    return dtme.ExpansionPlan(MANY, 2, modulation, {second: ["odd", "t2"], third: ["even", "odd"]}, widths, MIXED)


@pytest.fixture
def grouped(build, randomise):
    """grouped(client) → a plain model, the same expanded by ``mixed_plan``, and an input."""

    def make(client="timm ViT", **options):
        plain, x = build(client, MANY)
        model = dtme.expand(copy.deepcopy(plain), mixed_plan(plain), **options)
        randomise(model)
        return plain, model, x

    return make


def added_of(model):
    return {name.removeprefix("backbone."): p for name, p in model.named_parameters() if ".dtme." in name}


def rows_of_blocks(model, call):
    """How many rows every block was run on in ``call``."""
    rows = []
    handles = [
        model.backbone.get_submodule(name).register_forward_hook(lambda block, args, output: rows.append(len(output)))
        for name in find_blocks(model.backbone)
    ]
    call()
    for handle in handles:
        handle.remove()
    return rows


def test_parameters_are_named_by_their_owner_and_counted_once(grouped):
    plain, model, _ = grouped()
    names = [name.rpartition(".dtme.")[2] for name in added_of(model)]
    assert {name.partition(".")[2] for name in names} == {"odd", "even", "t2"}
    plan = mixed_plan(plain)
    assert sum(p.numel() for p in added_of(model).values()) == plan.added_parameters()


@pytest.mark.parametrize("client", ["timm ViT", "transformers BERT", "own, generic seam"])
def test_at_once_alone_and_concatenated_are_the_same(grouped, client):
    plain, model, x = grouped(client)
    plan, added = mixed_plan(plain), added_of(model)
    at_once = model(x)
    for task in MANY:
        with concatenated(plain.backbone, added, plan.owner(task)):
            want = plain(x, task)[task]
        torch.testing.assert_close(at_once[task], want, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(model(x, task)[task], want, rtol=1e-10, atol=1e-10)
    for tasks in (["t3", "t5", "t1"], ["t4", "t2", "t0"]):
        for task, prediction in model(x, tasks).items():
            torch.testing.assert_close(prediction, at_once[task], rtol=1e-10, atol=1e-10)
    features = model.extract(x, MANY)
    assert torch.equal(features["t1"], features["t3"]) and torch.equal(features["t0"], features["t4"])
    assert not torch.allclose(features["t1"], features["t0"]) and not torch.allclose(features["t2"], features["t5"])
    assert dtme.verify(model, x) < 1e-9 and dtme.sharing_of(model) == "shared prefix"


def test_blocks_run_on_as_many_rows_as_the_plan_says(grouped):
    _, model, x = grouped()
    plan = mixed_plan(model)
    for tasks in (MANY, ("t1", "t3"), ("t3",), ("t5", "t0"), ("t4", "t5", "t0", "t2")):
        model(x, tasks)  # compares, the first time
        rows = rows_of_blocks(model, lambda tasks=tasks: model(x, tasks))
        assert sum(rows) / (len(x) * len(rows)) == plan.compute(tasks), tasks
    assert plan.compute() == (2 + 4 + 4) / 3


def test_a_hundred_tasks_in_eight_groups_are_eight_streams(build, randomise):
    tasks = tuple(f"t{i}" for i in range(100))
    groups = {f"g{i}": tasks[i::8] for i in range(8)}
    model, x = build("own, generic seam", tasks)
    first, *_ = blocks = list(find_blocks(model.backbone))
    plan = dtme.ExpansionPlan(tasks, 2, {first: [*groups]}, {blocks[1]: tasks}, dict.fromkeys(blocks, WIDTH), groups)
    randomise(dtme.expand(model, plan))
    # to be compared, eight tasks alone and all at once; then all at once
    compared = rows_of_blocks(model, lambda: model(x))
    assert compared[: 3 * 8] == [len(x)] * 24 and compared[3 * 8 :] == [8 * len(x)] * 6
    assert plan.compute() == 8 and dtme.verify(model, x, tasks[::9]) < 1e-9
    some = [f"t{i}" for i in (12, 3, 90, 4)]  # of three groups, in another order
    for task, prediction in model(x, some).items():
        torch.testing.assert_close(prediction, model(x, task)[task], rtol=1e-10, atol=1e-10)


def test_gradients_of_a_groups_parameters_are_sums_over_its_tasks(grouped):
    _, model, x = grouped()

    def gradients(*calls):
        model.zero_grad()
        sum(p.square().sum() for out in calls for p in out.values()).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    alone = gradients(*(model(x, task) for task in MANY))
    for name, gradient in gradients(model(x)).items():
        torch.testing.assert_close(gradient, alone[name], rtol=1e-9, atol=1e-10)
    model.zero_grad()
    model(x, "t3")["t3"].sum().backward()
    reached = {name.rpartition(".")[2] for name, p in added_of(model).items() if p.grad is not None}
    assert reached == {"odd"}


@pytest.mark.parametrize("modulator", ["affine", "batch_norm"])
def test_saved_loaded_copied_exported_and_collapsed(grouped, build, tmp_path, modulator):
    plain, model, x = grouped(modulator=modulator)
    want = model(x)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "dtme_config.json").read_text())
    assert config["plan"]["groups"] == {"odd": ["t1", "t3"], "even": ["t4", "t0"]}
    assert list(config["plan"]["expansion"].values()) == [["odd", "t2"], ["even", "odd"]]
    other, _ = build("timm ViT", MANY, seed=5)
    loaded = dtme.MultiTaskModel.from_pretrained(tmp_path, other.backbone, other.heads)
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert same_predictions(loaded.eval()(x), want) and same_predictions(copy.deepcopy(model)(x), want)
    for task in MANY:
        single = model.export_task(task)
        torch.testing.assert_close(single(x), want[task], rtol=1e-10, atol=1e-10)
        owners = {name.rpartition(".")[2] for name, _ in single.named_parameters() if ".dtme." in name}
        assert owners == ({"t1": {"odd"}, "t0": {"even"}, "t2": {"t2"}, "t5": set()}.get(task, owners))
    program = torch.export.export(model.export_task("t3"), (x,))
    torch.testing.assert_close(program.module()(x), want["t3"], rtol=1e-10, atol=1e-10)
    dtme.collapse(model)
    assert list(model.state_dict()) == list(plain.state_dict()) and same_predictions(model(x), plain(x))


def test_batch_statistics_of_a_group_are_taken_once(grouped):
    _, model, x = grouped(modulator="batch_norm")
    model.train()
    block = next(iter(find_blocks(model.backbone)))
    model(x)
    at_once = model.backbone.get_buffer(f"{block}.dtme.running_mean.odd").clone()
    model.backbone.get_buffer(f"{block}.dtme.running_mean.odd").zero_()
    model(x, "t1")
    torch.testing.assert_close(model.backbone.get_buffer(f"{block}.dtme.running_mean.odd"), at_once)


def test_a_plan_from_a_file_expands_to_the_same_names(grouped, build, tmp_path):
    plain, model, _ = grouped()
    mixed_plan(plain).save(tmp_path / "plan.json")
    again, _ = build("timm ViT", MANY)
    dtme.expand(again, dtme.ExpansionPlan.load(tmp_path / "plan.json"))
    assert list(again.state_dict()) == list(model.state_dict())


def test_replanned_groups_keep_their_modules_and_gates_are_theirs(grouped, tmp_path):
    _, model, x = grouped()
    before, added = model(x), added_of(model)
    first, _, third = find_blocks(model.backbone)
    old = mixed_plan(model)
    expansion = {**old.expansion, first: ["odd"], third: ["even", "odd", "t2"]}
    plan = dtme.ExpansionPlan(MANY, 2, old.modulation, expansion, old.num_features, {**MIXED})
    dtme.replan(model, plan, gate_tokens=True)
    now = added_of(model)
    assert all(now[name] is parameter for name, parameter in added.items())
    assert {name for name in now if ".gate." in name} == {f"{first}.dtme.gate.odd", f"{third}.dtme.gate.t2"}
    for task, prediction in model(x).items():
        torch.testing.assert_close(prediction, before[task], rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        now[f"{first}.dtme.gate.odd"].fill_(0.7)
    changed = model(x)
    assert not torch.allclose(changed["t1"], before["t1"])
    torch.testing.assert_close(changed["t0"], before["t0"], rtol=1e-10, atol=1e-10)
    assert dtme.verify(model, x) < 1e-9
    torch.testing.assert_close(model.export_task("t3")(x), changed["t3"], rtol=1e-10, atol=1e-10)
    model.save_pretrained(tmp_path)
    plain, _, _ = grouped()
    loaded = dtme.MultiTaskModel.from_pretrained(tmp_path, plain.backbone, plain.heads).eval()
    assert same_predictions(loaded(x), changed)
    # a group that is dissolved leaves its modules behind
    dtme.replan(
        model, dtme.ExpansionPlan(MANY, 2, {first: ["odd", "t0", "t4"]}, {}, old.num_features, {"odd": ("t1", "t3")})
    )
    assert {name.rpartition(".")[2] for name in added_of(model)} == {"odd", "t0", "t4"}
    assert added_of(model)[f"{first}.dtme.weight.odd"] is added[f"{first}.dtme.weight.odd"]


def test_parts_expanded_by_themselves_may_have_other_groups():
    torch.manual_seed(0)
    model = dtme.MultiTaskModel(Two(), {task: nn.Identity() for task in TASKS}, features=lambda net, x: net(x))
    for part, groups in ((model.backbone.left, {"g": ("a", "b")}), (model.backbone.right, {"g": ("d", "b", "c")})):
        dtme.expand(part, dtme.ExpansionPlan(TASKS, 2, {"layers.0": ["g"]}, {"layers.1": ["g"]}, groups=groups))
    model.double().eval()
    with torch.no_grad():
        for parameter in added_of(model).values():
            parameter.add_(torch.randn_like(parameter))
    x = torch.randn(3, 5, WIDTH).double()
    assert dtme.verify(model, x) < 1e-9 and dtme.sharing_of(model) == "shared prefix"
    rows = []
    model.backbone.right.layers[1].register_forward_hook(lambda block, args, output: rows.append(len(output)))
    at_once = model(x)
    assert rows == [3 * 3]  # a; b; c and d
    assert torch.equal(at_once["c"], at_once["d"]) and not torch.allclose(at_once["b"], at_once["c"])


def test_an_analysis_of_grouped_tasks_is_the_same_in_streams_and_in_runs_of_every_owner(grouped):
    reports = []
    for shared_prefix in (True, False):
        _, model, x = grouped("own, generic seam", shared_prefix=shared_prefix)
        generator = torch.Generator().manual_seed(0)
        targets = {task: torch.randn(p.shape, generator=generator).double() for task, p in model(x).items()}
        losses = dict.fromkeys(MANY, nn.functional.mse_loss)
        reports.append(dtme.analyze(model, [(x, targets)], losses, progress=False))
    ours, want = reports
    assert torch.equal(ours.valid_counts, want.valid_counts) and (ours.valid_counts.sum((1, 2)) > 0).all()
    torch.testing.assert_close(ours.eigenvalues, want.eigenvalues)
    assert torch.equal(ours.range_counts, want.range_counts) and torch.equal(ours.null_counts, want.null_counts)


def test_a_backbone_of_its_own_loop(grouped):
    _, model, x = grouped()
    names = ["t3", "t5", "t0", "t1"]
    with dtme.tasks(model.backbone, names):
        output = model.backbone(x)
    parts = dtme.split(output, names)
    assert torch.equal(parts["t3"], parts["t1"])
    for task in names:
        with dtme.tasks(model.backbone, task):
            torch.testing.assert_close(parts[task], model.backbone(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("make", [OwnTransformer, Mixing])
def test_where_tasks_do_not_share_every_owner_runs_once(make):
    torch.manual_seed(0)
    net = make()
    model = dtme.MultiTaskModel(net, {task: nn.Identity() for task in MANY}, features=lambda net, x: net(x))
    model.double().eval()
    dtme.expand(model, mixed_plan(model), shared_prefix=False if make is OwnTransformer else "auto")
    with torch.no_grad():
        for p in added_of(model).values():
            p.add_(0.5 * torch.randn_like(p))
    x = torch.randn(3, 5, WIDTH).double()
    if make is Mixing:
        with pytest.warns(UserWarning, match="runs once for every task"):
            model(x)
        model(x)  # is compared again, as sizes may have coincided the first time
    rows = rows_of_blocks(model, lambda: model(x))
    assert rows == [3] * 3 * 4  # odd, even, t2, and t5, which has no modules
    at_once = model(x)
    for task in MANY:
        assert torch.equal(at_once[task], model(x, task)[task])
    assert rows_of_blocks(model, lambda: model(x, ["t1", "t3"])) == [3] * 3


def test_one_group_runs_once_whatever_the_backbone_does(grouped):
    """Tasks in one stream all along need no comparison, and may change the number of rows on the way."""

    class Uneven(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = OwnTransformer()

        def forward(self, x):
            for layer in self.encoder.layers:
                x = torch.cat([layer(row[None]) for row in x]) if len(x) < 3 else layer(x)
                x = torch.cat([x, x.mean(0, keepdim=True)])
            return x[:2]

    model = dtme.MultiTaskModel(Uneven(), {task: nn.Identity() for task in MANY}, features=lambda net, x: net(x))
    model.double().eval()
    block = next(iter(find_blocks(model.backbone)))
    dtme.expand(model, dtme.ExpansionPlan(MANY, 2, {block: ["g"]}, groups={"g": MANY[:4]}))
    with torch.no_grad():
        added_of(model)[f"{block}.dtme.weight.g"].mul_(2)
    x = torch.randn(2, 5, WIDTH).double()
    at_once = model(x, MANY[:4])
    assert all(torch.equal(at_once[task], model(x, task)[task]) for task in MANY[:4])
    assert not torch.allclose(at_once["t0"], model(x, "t5")["t5"]) and dtme.sharing_of(model) == "shared prefix"


def test_compiled_tasks_of_groups_share_a_graph(grouped):
    torch._dynamo.reset()
    _, model, x = grouped()
    model.heads = nn.ModuleDict({task: nn.Linear(WIDTH, 2) for task in MANY}).double()
    compiler = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=compiler, fullgraph=True)
    with torch.no_grad():
        for task in MANY:
            torch.testing.assert_close(compiled(x, task)[task], model(x, task)[task], rtol=1e-10, atol=1e-10)
    assert compiler.frame_count == 2  # the backbone, and the heads, which are of one kind
    torch._dynamo.reset()


def test_a_group_named_as_another_task_of_the_model_is_refused(build):
    model, x = build("own, generic seam", MANY)
    block = next(iter(find_blocks(model.backbone)))
    before, names = model(x), list(model.state_dict())
    plan = dtme.ExpansionPlan(("t0", "t1"), 2, {block: ["t5"]}, groups={"t5": ("t0", "t1")})
    with pytest.raises(ValueError, match="group 't5' has the name of another task of the model"):
        dtme.expand(model, plan)
    assert not dtme.is_expanded(model) and list(model.state_dict()) == names and same_predictions(model(x), before)
