"""The wrapper in use: copies, export, compile, checkpointing, low precision, optimizers, features."""

import copy
import io
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import dtme
from dtme.blocks import find_blocks
from tests.dtme.clients import CLIENTS, TASKS, WIDTH, OwnTransformer, make_input, mixed_plan, same_predictions

# --- copies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("client", CLIENTS)
def test_deepcopy_and_pickle_are_independent_models(expanded, client):
    model, x = expanded(client)
    want = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same_predictions(other(x), want)
        with torch.no_grad():
            for name, parameter in other.named_parameters():
                if ".dtme." in name:
                    parameter.zero_()
        with dtme.tasks(other, "depth"):
            assert same_predictions(model(x), want)
        assert not torch.equal(other(x)["depth"], want["depth"])
        dtme.collapse(other)
        assert same_predictions(model(x), want)


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


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("together", [True, False], ids=["one forward", "a forward a task, one backward"])
def test_activation_checkpointing_gives_the_same_gradients(expanded, together, use_reentrant):
    model, x = expanded("own, generic seam")
    model.train()
    parameters = dict(model.named_parameters())

    def backward(model):
        model.zero_grad()
        calls = [model(x)] if together else [model(x.clone(), task) for task in TASKS]
        sum(p.square().sum() for out in calls for p in out.values()).backward()  # reentrant takes no autograd.grad
        return {name: p.grad.clone() for name, p in parameters.items()}

    x.requires_grad_()
    want = backward(model)
    got = backward(checkpointed(model, use_reentrant))
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
    dtme.expand(model, mixed_plan(model), freeze_backbone=True)
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
    ],
)
def test_bad_models_say_what_is_wrong(backbone, heads, features, error, says):
    with pytest.raises(error, match=says):
        dtme.MultiTaskModel(backbone, heads, features)(torch.zeros(2, 3, 4))


def test_what_would_be_dropped_is_refused(expanded):
    model, x = expanded("transformers ViT")
    by_name = model(**x) if isinstance(x, dict) else model(pixel_values=x)
    with pytest.raises(TypeError, match="nothing beside x, got 'token_type_ids', 'bool_masked_pos' too"):
        model(x, "depth", token_type_ids=x, bool_masked_pos=None)
    assert same_predictions(model(x), by_name)


# --- a backbone that is called as before ------------------------------------------------------------------------------


def test_a_bare_backbone_says_once_that_it_returns_the_rows_of_all_tasks():
    backbone, x = OwnTransformer(), torch.randn(2, 5, WIDTH)
    dtme.expand(backbone, mixed_plan(dtme.MultiTaskModel(backbone, {"a": nn.Identity()})))
    model = dtme.MultiTaskModel(backbone, {task: nn.Identity() for task in TASKS})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x), model(x, "depth"), dtme.verify(model, x), dtme.verify(backbone, x)
        for chosen in (TASKS, "depth"):
            with dtme.tasks(backbone, chosen):
                backbone(x)
    with pytest.warns(UserWarning, match=r"OwnTransformer is expanded, and returns 3 \* B rows .*split") as caught:
        rows = backbone(x)
    assert rows.shape[0] == 3 * len(x) and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backbone(x)
