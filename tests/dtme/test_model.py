"""The wrapper in use: saving, copies, export, compile, checkpointing, low precision, training."""

import copy
import io
import json
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import dtme
from dtme.blocks import find_blocks
from tests.dtme.clients import CLIENTS, TASKS, WIDTH, OwnTransformer, make_input


def some_plan(model):
    first, second, third = find_blocks(model.backbone)
    return dtme.ExpansionPlan(
        TASKS, 2, {first: ("depth",), second: TASKS}, {second: TASKS, third: ("depth", "normals")}
    )


@pytest.fixture
def expanded(build, randomise):
    def make(client="transformers ViT"):
        model, x = build(client)
        dtme.expand(model, some_plan(model))
        randomise(model)
        return model, x

    return make


def fresh(client):
    torch.manual_seed(99)
    return CLIENTS[client]().double(), {task: nn.Linear(WIDTH, 2 + i).double() for i, task in enumerate(TASKS)}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[task], b[task]) for task in a)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("client", CLIENTS)
def test_saved_model_predicts_the_same_bits(expanded, tmp_path, client):
    model, x = expanded(client)
    model.save_pretrained(tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["dtme_config.json", "model.safetensors"]
    again = dtme.MultiTaskModel.from_pretrained(tmp_path / "run", *fresh(client)).eval()
    assert equal(model(x), again(x)) and list(again.state_dict()) == list(model.state_dict())


def test_expansion_only_is_small_and_goes_into_the_same_pretrained_model(build, randomise, tmp_path):
    model, x = build()
    dtme.expand(model, some_plan(model))
    randomise(model)
    model.save_pretrained(tmp_path / "full")
    model.save_pretrained(tmp_path / "added", expansion_only=True)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("full", "added")]
    assert sizes[1] < sizes[0] / 5
    pretrained, _ = build()
    again = dtme.MultiTaskModel.from_pretrained(tmp_path / "added", pretrained.backbone, dict(pretrained.heads)).eval()
    assert equal(model(x), again(x))


def test_unexpanded_and_batch_norm_models_and_frozen_ones(build, tmp_path):
    model, x = build()
    model.save_pretrained(tmp_path)
    assert equal(model(x), dtme.MultiTaskModel.from_pretrained(tmp_path, *fresh("transformers ViT")).eval()(x))
    dtme.expand(model, some_plan(model), modulator="batch_norm", freeze_backbone=True)
    model.train()(x)
    model.eval().save_pretrained(tmp_path)  # over the earlier save
    again = dtme.MultiTaskModel.from_pretrained(tmp_path, *fresh("transformers ViT")).eval()
    assert equal(model(x), again(x)) and not again.backbone.layers[0].mlp.fc1.weight.requires_grad


def test_tied_weights_are_stored_once(tmp_path):
    heads = {"a": nn.Linear(WIDTH, 3), "b": nn.Linear(WIDTH, 3)}
    heads["b"].weight = heads["a"].weight
    model = dtme.MultiTaskModel(OwnTransformer(), heads)
    model.save_pretrained(tmp_path)
    again = dtme.MultiTaskModel.from_pretrained(
        tmp_path, OwnTransformer(), {"a": nn.Linear(WIDTH, 3), "b": nn.Linear(WIDTH, 3)}
    )
    assert torch.equal(again.heads["b"].weight, heads["a"].weight)
    assert json.loads((tmp_path / "dtme_config.json").read_text())["aliases"] == {"heads.b.weight": "heads.a.weight"}


def flip_a_length(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])


def rewrite(**change):
    def edit(folder):
        path = folder / "dtme_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))

    return edit


@pytest.mark.parametrize(
    ("damage", "error", "says"),
    [
        (lambda f: (f / "model.safetensors").unlink(), FileNotFoundError, "model.safetensors is missing"),
        (lambda f: (f / "dtme_config.json").unlink(), FileNotFoundError, "dtme_config.json is missing"),
        (lambda f: (f / "dtme_config.json").write_text("{"), ValueError, "not valid JSON"),
        (rewrite(format="bert"), ValueError, "not a dtme.MultiTaskModel file"),
        (rewrite(version=7), ValueError, "version 7"),
        (flip_a_length, ValueError, "model.safetensors is damaged"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), ValueError, "model.safetensors is damaged"),
        (rewrite(tasks=["a", "b"]), ValueError, r"holds the tasks \['a', 'b'\]"),
    ],
)
def test_damaged_folders_name_the_file(expanded, tmp_path, damage, error, says):
    model, _ = expanded()
    model.save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(error, match=says):
        dtme.MultiTaskModel.from_pretrained(tmp_path, *fresh("transformers ViT"))


def test_foreign_weights_and_other_architectures_leave_the_backbone_alone(expanded, tmp_path):
    from safetensors.torch import save_file

    model, _ = expanded()
    model.save_pretrained(tmp_path)
    backbone, heads = fresh("transformers ViT")
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    wide = {**heads, "depth": nn.Linear(WIDTH, 9).double()}
    for heads_, says in (
        (wide, "holds 'heads.depth.weight' as"),
        ({**heads, "depth": nn.Identity()}, "holds 'heads.depth.bias'"),
    ):
        with pytest.raises(ValueError, match=says):
            dtme.MultiTaskModel.from_pretrained(tmp_path, backbone, heads_)
    with pytest.raises(ValueError, match="saved from another architecture"):
        dtme.MultiTaskModel.from_pretrained(tmp_path, OwnTransformer(), heads)
    save_file({"x": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="was not written by save_pretrained"):
        dtme.MultiTaskModel.from_pretrained(tmp_path, backbone, heads)
    assert not hasattr(backbone, "_dtme") and backbone.state_dict().keys() == before.keys()
    assert all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())


def test_a_crash_between_the_two_files_leaves_one_whole_model(expanded, tmp_path, monkeypatch):
    """Whenever writing stops, the folder loads as the old model or as the new one, and nothing else is left in it."""
    old, x = expanded()
    new = copy.deepcopy(old)
    with torch.no_grad():
        new.heads["depth"].weight.add_(1.0)
    from dtme import files

    for stop in range(1, 5):
        old.save_pretrained(tmp_path)
        steps = iter(range(1, 9))
        replace = type(tmp_path).replace
        fsync = files.os.fsync

        def maybe(call, steps=steps, stop=stop):
            def stopped(*args):
                if next(steps) == stop:
                    raise KeyboardInterrupt
                return call(*args)

            return stopped

        with monkeypatch.context() as patch:
            patch.setattr(type(tmp_path), "replace", maybe(replace))
            patch.setattr(files.os, "fsync", maybe(fsync))
            with pytest.raises(KeyboardInterrupt):
                new.save_pretrained(tmp_path)
        again = dtme.MultiTaskModel.from_pretrained(tmp_path, *fresh("transformers ViT")).eval()
        assert equal(again(x), (old if stop <= 2 else new)(x)), stop
        assert sorted(p.name for p in tmp_path.iterdir()) == ["dtme_config.json", "model.safetensors"]


def test_training_resumes_bit_for_bit(build, tmp_path):
    def train(model, optimizer, steps, x):
        for _ in range(steps):
            optimizer.zero_grad()
            sum(p.square().mean() for p in model(x).values()).backward()
            optimizer.step()

    def start():
        model, x = build()
        dtme.expand(model, some_plan(model))
        return model, x

    def adam(model):
        return torch.optim.Adam(model.parameter_groups(lr=1e-2, weight_decay=1e-3))

    torch.manual_seed(5)
    straight, x = start()
    optimizer = adam(straight)
    train(straight, optimizer, 2, x)
    straight.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    train(straight, optimizer, 2, x)
    resumed = dtme.MultiTaskModel.from_pretrained(tmp_path, *fresh("transformers ViT")).eval()
    again = adam(resumed)
    again.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    train(resumed, again, 2, x)
    assert equal(straight(x), resumed(x))


# --- copies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("client", CLIENTS)
def test_deepcopy_and_pickle_are_independent_models(expanded, client):
    model, x = expanded(client)
    want = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert equal(other(x), want)
        with torch.no_grad():
            for name, parameter in other.named_parameters():
                if ".dtme." in name:
                    parameter.zero_()
        with dtme.tasks(other, "depth"):
            assert equal(model(x), want)
        assert not torch.equal(other(x)["depth"], want["depth"])
        dtme.collapse(other)
        assert equal(model(x), want)


def test_a_pickle_opens_where_nothing_was_expanded(expanded, tmp_path):
    model, x = expanded("transformers ViT")
    torch.save((model, x, model(x)["depth"]), tmp_path / "model.pt")
    code = (
        "import sys, torch, tests.conftest\n"
        "model, x, want = torch.load(sys.argv[1], weights_only=False)\n"
        "assert torch.equal(model(x)['depth'], want)\n"
    )
    paths = [str(p) for p in sys.path if p]
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {paths!r}\n{code}", tmp_path / "model.pt"],
        capture_output=True,
    )
    assert result.returncode == 0, result.stderr.decode()


@pytest.mark.parametrize("client", CLIENTS)
def test_exported_task_is_plain_and_alone(expanded, client):
    model, x = expanded(client)
    for task in TASKS:
        single = model.export_task(task)
        torch.testing.assert_close(single(x), model(x, task)[task], rtol=1e-12, atol=1e-12)
        names = [name for name, _ in single.named_parameters() if ".dtme." in name]
        assert names and all(name.endswith(f".{task}") and ".tokens." not in name for name in names)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert single(x).abs().sum() > 0
    with pytest.raises(ValueError, match="unknown task 'pose'"):
        model.export_task("pose")


@pytest.mark.parametrize("client", ["transformers ViT", "transformers DINOv2", "timm ViT", "own, generic seam"])
def test_exported_task_goes_through_torch_export(expanded, client):
    model, x = expanded(client)
    single = model.export_task("depth")
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(single, (x,), dynamic_shapes=({0: batch},))
    stream = io.BytesIO()
    torch.export.save(program, stream)
    stream.seek(0)
    loaded = torch.export.load(stream).module()
    for rows in (len(x), 5):
        other = make_input(client, rows, seed=4)
        torch.testing.assert_close(loaded(other), single(other), rtol=1e-10, atol=1e-10)


# --- running ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("client", ["transformers ViT", "timm ViT", "own, generic seam"])
def test_compiles_in_one_graph(expanded, client):
    model, x = expanded(client)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for chosen in (None, "depth"):
        want, got = model(x, chosen), compiled(x, chosen)
        for task in want:
            torch.testing.assert_close(got[task], want[task], rtol=1e-10, atol=1e-10)
    loss = sum(p.square().sum() for p in compiled(x).values())
    want = sum(p.square().sum() for p in model(x).values())
    parameters = [p for p in model.parameters() if p.requires_grad]
    for a, b in zip(
        *(torch.autograd.grad(value, parameters, allow_unused=True) for value in (loss, want)), strict=True
    ):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def checkpointed(model, use_reentrant):
    for name, block in model.backbone.layers.named_children():
        setattr(model.backbone.layers, name, Checkpointed(block, use_reentrant))
    return model


class Checkpointed(nn.Module):
    def __init__(self, block, use_reentrant):
        super().__init__()
        self.block, self.use_reentrant = block, use_reentrant

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("together", [True, False], ids=["one forward", "a forward a task, one backward"])
def test_activation_checkpointing_gives_the_same_gradients(expanded, together):
    model, x = expanded("own, generic seam")
    parameters = dict(model.named_parameters())

    def gradients(model):
        calls = [model(x)] if together else [model(x.clone(), task) for task in TASKS]
        loss = sum(p.square().sum() for out in calls for p in out.values())
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        return dict(zip(parameters, found, strict=True))

    want = gradients(model)
    got = gradients(checkpointed(model, use_reentrant=False))
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-9, atol=1e-10)


def test_transformers_own_gradient_checkpointing(expanded):
    model, x = expanded("transformers ViT")
    model.train()
    want = torch.autograd.grad(
        sum(p.square().sum() for p in model(x).values()), list(model.parameters()), allow_unused=True
    )
    model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    first, second = model(x, "depth"), model(x, ["semseg", "normals"])  # two choices before one backward
    loss = sum(p.square().sum() for p in (first | second).values())
    got = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_reentrant_checkpointing_is_an_error_rather_than_wrong_gradients(expanded):
    model, x = expanded("own, generic seam")
    checkpointed(model, use_reentrant=True)
    loss = model(x.requires_grad_(), "depth")["depth"].sum()
    with pytest.raises(RuntimeError, match=r"use_reentrant=False"):
        loss.backward()


@pytest.mark.parametrize("client", ["transformers ViT", "timm ViT", "own, generic seam"])
def test_autocast_and_low_precision_weights(expanded, client):
    model, x = expanded(client)
    model, x = model.float(), x.float()
    want = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model(x)
        loss = sum(p.float().square().mean() for p in got.values())
    loss.backward()
    low = model.bfloat16()(x.bfloat16())
    for task in want:
        scale = want[task].abs().max()
        assert (got[task].float() - want[task]).abs().max() < 0.1 * scale
        assert low[task].dtype == torch.bfloat16 and (low[task].float() - want[task]).abs().max() < 0.2 * scale
    assert all(p.grad is not None and p.grad.isfinite().all() for n, p in model.named_parameters() if ".dtme." in n)


def test_tasks_that_did_not_run_do_not_move_under_adam(expanded):
    model, x = expanded("own, generic seam")
    groups = model.parameter_groups(lr=1e-2, weight_decay=0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    optimizer = torch.optim.Adam(groups)
    for tasks in (None, "depth", "depth"):
        before = {name: p.detach().clone() for name, p in model.named_parameters() if ".dtme." in name}
        optimizer.zero_grad()
        sum(p.square().mean() for p in model(x, tasks).values()).backward()
        optimizer.step()
        moved = {
            name.split(".")[-1] for name, value in before.items() if not torch.equal(model.get_parameter(name), value)
        }
        assert moved == (set(TASKS) if tasks is None else {"depth"})


def test_features_cls_and_a_function_with_taps_before_the_streams_part(build, randomise):
    model, x = build("transformers ViT")
    cls = dtme.MultiTaskModel(model.backbone, dict(model.heads), features="cls")
    torch.testing.assert_close(cls(x)["depth"], model(x)["depth"][:, 0])

    class Sum(nn.Module):
        def forward(self, states):
            return sum(states)

    def taps(backbone, x):
        return backbone(x, output_hidden_states=True).hidden_states

    tapped = dtme.MultiTaskModel(model.backbone, {task: Sum() for task in TASKS}, features=taps)
    blocks = list(find_blocks(model.backbone))
    plan = dtme.ExpansionPlan(TASKS, 1, {blocks[1]: ("depth",), blocks[2]: TASKS})
    dtme.expand(tapped, plan)
    randomise(tapped)
    everything = tapped(x)
    for task in TASKS:
        alone = tapped(x, task)[task]
        assert alone.shape == (3, 5, WIDTH)
        torch.testing.assert_close(everything[task], alone, rtol=1e-12, atol=1e-12)


def test_printing_parameters(build, capsys):
    model, _ = build()
    dtme.expand(model, some_plan(model), freeze_backbone=True)
    model.print_trainable_parameters()
    text = capsys.readouterr().out
    added = 2 * WIDTH * (1 + 3) + 2 * WIDTH * (3 + 2)
    assert f"added {added:,} (" in text and "trainable" in text


@pytest.mark.parametrize(
    ("backbone", "heads", "features", "error", "says"),
    [
        (nn.Identity(), {}, "tokens", ValueError, "non-empty sequence"),
        (nn.Identity(), [nn.Identity()], "tokens", TypeError, "heads must map"),
        (nn.Identity(), {"a.b": nn.Identity()}, "tokens", ValueError, "without dots"),
        (nn.Identity(), {"a": nn.Identity()}, "patches", ValueError, "features must be"),
        (nn.Flatten(), {"a": nn.Identity()}, "tokens", TypeError, r"needs a backbone that returns \(B, N, p\)"),
        (nn.Identity(), {"a": nn.Identity()}, lambda b, x: x[:1], ValueError, "does not start with 2 rows"),
    ],
)
def test_bad_models_say_what_is_wrong(backbone, heads, features, error, says):
    with pytest.raises(error, match=says):
        dtme.MultiTaskModel(backbone, heads, features)(torch.zeros(2, 3, 4))
