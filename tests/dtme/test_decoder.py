"""Decoders that read the features of all tasks at once."""

import copy
import json
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import dtme
from dtme.blocks import find_blocks
from dtme_kernels import count_conflicts, split_token_space, token_covariance
from tests.dtme.clients import (
    TASKS,
    WIDTH,
    OwnTransformer,
    concatenated,
    make_input,
    mixed_plan,
    same_predictions,
)


class Mixing(nn.Module):
    """Every task's prediction reads the features of all."""

    def __init__(self, tasks=TASKS):
        super().__init__()
        self.out = nn.ModuleDict({task: nn.Linear(WIDTH * len(tasks), 2 + i) for i, task in enumerate(tasks)})
        self.tasks = tasks

    def forward(self, features):
        everything = torch.cat([features[task] for task in self.tasks], -1).sin()
        return {task: out(everything) for task, out in self.out.items()}


class Separate(nn.Module):
    """Reads each task's own; ``cross`` adds what it makes of all that it is given."""

    def __init__(self, cross=None):
        super().__init__()
        self.out = nn.ModuleDict({task: nn.Linear(WIDTH, 2) for task in TASKS})
        self.cross = cross

    def forward(self, features):
        rest = 0.0 if self.cross is None else self.cross(features)
        return {task: self.out[task](found) + rest for task, found in features.items()}


def decoding(decoder=None, heads=None, *, depth=3, expands=True, shared_prefix="auto", **options):
    """A model with a decoder, expanded and away from the identity, and an input."""
    torch.manual_seed(0)
    decoder = Mixing() if decoder is None else decoder
    model = dtme.MultiTaskModel(OwnTransformer(depth), heads, decoder=decoder, **options).double().eval()
    if expands:
        small = dtme.ExpansionPlan(TASKS, 2, {"layers.0": TASKS}, {"layers.0": ("depth",)})
        dtme.expand(model, mixed_plan(model) if depth == 3 else small, shared_prefix=shared_prefix)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model, make_input("own")


def features_alone(backbone, added, x):
    """What every task gets by concatenation in a plain backbone."""
    found = {}
    for task in TASKS:
        with concatenated(backbone, added, task):
            found[task] = backbone(x)
    return found


def loss_of(predictions):
    return sum((i + 1) * p.square().mean() for i, p in enumerate(predictions.values()))


def added_to(model):
    return {n.removeprefix("backbone."): p for n, p in model.named_parameters() if ".dtme." in n}


@pytest.mark.parametrize("shared_prefix", [True, False], ids=["shared prefix", "one by one"])
@pytest.mark.parametrize("heads", [False, True], ids=["a decoder", "a decoder and some heads"])
def test_equals_the_decoder_on_concatenated_features(heads, shared_prefix):
    some = {"depth": nn.Linear(3, 4)} if heads else None
    model, x = decoding(heads=some, tasks=TASKS, shared_prefix=shared_prefix)
    plain = dtme.collapse(copy.deepcopy(model))
    added = added_to(model)
    want = plain.decoder(features_alone(plain.backbone, added, x))
    if heads:
        want["depth"] = plain.heads["depth"](want["depth"])
    got = model(x)
    assert tuple(got) == model.tasks == TASKS
    for task in TASKS:
        torch.testing.assert_close(got[task], want[task], rtol=1e-10, atol=1e-10)
    ours = torch.autograd.grad(loss_of(got), list(model.parameters()))
    rest = dict(plain.named_parameters())
    same = [rest.get(name, parameter) for name, parameter in model.named_parameters()]
    for a, b in zip(ours, torch.autograd.grad(loss_of(want), same), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_a_task_alone_is_predicted_from_the_features_of_all():
    model, x = decoding()
    want = model(x)
    assert torch.equal(model(x, "depth")["depth"], want["depth"]) and list(model(x, "depth")) == ["depth"]
    assert list(model(x, ["normals", "semseg"])) == ["normals", "semseg"]
    given = []
    spying = dtme.MultiTaskModel(model.backbone, decoder=lambda features: given.append(features) or dict(features))
    assert spying.tasks == TASKS and list(spying(x, "depth")) == ["depth"] and tuple(given[0]) == TASKS


def test_where_the_names_of_tasks_come_from():
    def decoder(features):
        return {task: found.mean((1, 2)) for task, found in features.items()}

    backbone, x, heads = OwnTransformer(), torch.randn(2, 5, WIDTH), {"a": nn.Identity()}
    assert dtme.MultiTaskModel(backbone, heads, decoder=Mixing(), tasks=["b", "a"]).tasks == ("b", "a")
    assert dtme.MultiTaskModel(backbone, heads, decoder=Mixing()).tasks == ("a",)
    assert dtme.MultiTaskModel(backbone, decoder=Mixing()).tasks == TASKS
    model = dtme.MultiTaskModel(backbone, decoder=decoder)
    assert model.tasks == ()
    assert list(model(x, ["y", "x"])) == ["y", "x"] and list(model(x, "x")) == ["x"]
    with pytest.raises(ValueError, match=r"nothing has named the tasks .* give MultiTaskModel\(\.\.\., tasks="):
        model(x)
    dtme.expand(model, mixed_plan(model))
    assert model.tasks == tuple(model(x)) == TASKS
    with pytest.raises(ValueError, match="unknown task 'y'"):
        model(x, "y")


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({}, TypeError, "heads must map"),
        ({"heads": {}}, ValueError, "non-empty sequence"),
        ({"decoder": 3}, TypeError, "decoder must be a function or a module, got int"),
        ({"decoder": Mixing(), "tasks": "depth"}, ValueError, "non-empty sequence of names"),
        ({"heads": {"a": nn.Identity()}, "tasks": ["a", "b"]}, ValueError, "task 'b' has no head, and there is no dec"),
        ({"heads": {"a": nn.Identity()}, "decoder": dict, "tasks": ["b"]}, ValueError, "heads name the unknown task"),
    ],
)
def test_bad_models_say_what_is_wrong(options, error, says):
    with pytest.raises(error, match=says):
        dtme.MultiTaskModel(nn.Identity(), **options)


class Whole(nn.Module):
    """A model with its own decoder, of which a method is handed over."""

    def __init__(self):
        super().__init__()
        self.backbone, self.neck = OwnTransformer(), nn.Linear(WIDTH, 2)

    def decode(self, features):
        return {task: self.neck(found) for task, found in features.items()}

    def taps(self, backbone, x):
        return backbone(x)


def test_a_method_whose_weights_the_model_would_not_hold_is_told_of():
    whole, says = Whole(), "{} is a method of a Whole whose parameters are not all this model's"
    with pytest.warns(UserWarning, match=says.format("decoder")):
        dtme.MultiTaskModel(whole.backbone, decoder=whole.decode, tasks=TASKS)
    with pytest.warns(UserWarning, match=says.format("features")):
        dtme.MultiTaskModel(whole.backbone, {"a": nn.Identity()}, features=whole.taps)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dtme.MultiTaskModel(whole, decoder=whole.decode, tasks=TASKS)  # it holds them all


@pytest.mark.parametrize(
    ("decoder", "got"),
    [(lambda f: list(f.values()), "in a list"), (lambda f: {"semseg": 1, "depth": 2}, r"of \['semseg', 'depth'\]")],
)
def test_what_a_decoder_returns_is_checked(decoder, got):
    model = dtme.MultiTaskModel(OwnTransformer(), decoder=decoder, tasks=TASKS)
    with pytest.raises(ValueError, match=rf"the decoder <lambda> must return .*'normals'\], but it .* {got}"):
        model(torch.randn(2, 5, WIDTH))


# --- analysis ---------------------------------------------------------------------------------------------------------


def streams_at(blocks, plan):
    """Who shares tokens at the input of every block, by the plan."""
    shared, found = set(TASKS), []
    for block in blocks:
        found.append({task: shared if task in shared else {task} for task in TASKS})
        leaving = {*plan.modulation.get(block, ()), *plan.expansion.get(block, ())}
        shared = shared - leaving
    return found


def naive_counts(plain, added, plan, batches, losses):
    """Counts of every block, by autograd.grad of each loss with respect to the inputs of blocks of one copy a task."""
    blocks = list(find_blocks(plain.backbone))
    streams = streams_at(blocks, plan)
    tokens, grads = ({block: [] for block in blocks} for _ in range(2))
    for x, targets in batches:
        inputs, features = {}, {}
        for task in TASKS:
            seen = []
            handles = [
                plain.backbone.get_submodule(block).register_forward_pre_hook(
                    lambda module, args, seen=seen: seen.append(args[0].requires_grad_()), prepend=True
                )
                for block in blocks
            ]
            with concatenated(plain.backbone, added, task):
                features[task] = plain.backbone(x.clone())
            for handle in handles:
                handle.remove()
            inputs[task] = seen
        predictions = plain.decoder(features)
        for d, block in enumerate(blocks):
            everyone = [inputs[task][d] for task in TASKS]
            tokens[block].append(torch.stack(everyone, 1))
            of_losses = []
            for task in TASKS:
                loss = losses[task](predictions[task], targets[task])
                parts = torch.autograd.grad(loss, everyone, retain_graph=True)
                of_losses.append(sum(g for t, g in zip(TASKS, parts, strict=True) if t in streams[d][task]))
            grads[block].append(torch.stack(of_losses))
    counts = []
    for block in blocks:
        space = split_token_space(token_covariance(torch.cat(tokens[block]).detach()))
        counts.append(count_conflicts(torch.cat(grads[block], 1), space.basis, space.rank))
    return counts


@pytest.mark.parametrize(
    ("expands", "shared_prefix"),
    [(False, True), (True, True), (True, False)],
    ids=["plain", "expanded", "expanded, one by one"],
)
def test_analysis_equals_a_naive_one(expands, shared_prefix):
    model, _ = decoding(expands=expands, shared_prefix=shared_prefix)
    torch.manual_seed(3)
    batches = [
        (torch.randn(3, 5, WIDTH).double(), {t: torch.randn(3, 5, 2 + i).double() for i, t in enumerate(TASKS)})
        for _ in range(2)
    ]
    losses = dict(zip(TASKS, (F.mse_loss, F.l1_loss, F.smooth_l1_loss), strict=True))
    report = dtme.analyze(model, batches, losses, progress=False)
    plan = mixed_plan(model) if expands else dtme.ExpansionPlan(TASKS)
    plain = dtme.collapse(copy.deepcopy(model)) if expands else model
    for parameter in plain.parameters():
        parameter.requires_grad_(False)
    added = {name: value.detach() for name, value in added_to(model).items()}
    for d, want in enumerate(naive_counts(plain, added, plan, batches, losses)):
        for kind in ("range", "null", "valid"):
            assert torch.equal(getattr(report, f"{kind}_counts")[d], getattr(want, kind)), (d, kind)
    some = {task: losses[task] for task in TASKS[1:]}  # the decoder gets the features of all tasks nevertheless
    pair = dtme.analyze(model, batches, some, progress=False)
    assert torch.equal(pair.valid_counts, report.valid_counts[:, 1:, 1:])
    if not expands:
        assert torch.equal(pair.range_counts, report.range_counts[:, 1:, 1:])


def test_analysis_where_nothing_has_named_the_tasks():
    model = dtme.MultiTaskModel(OwnTransformer(), decoder=lambda features: features)
    batches = [(torch.randn(2, 5, WIDTH), dict.fromkeys("ab", torch.zeros(2, 5, WIDTH)))] * 2
    report = dtme.analyze(model, batches, {"a": F.mse_loss, "b": F.l1_loss}, progress=False)
    assert report.tasks == ("a", "b")
    dtme.expand(model, report.plan(expansion=0))
    with pytest.raises(ValueError, match=r"unknown task 'c'; the model's tasks are \['a', 'b'\]"):
        dtme.analyze(model, batches, {"a": F.mse_loss, "c": F.l1_loss}, progress=False)


# --- saving, copies, exports, compiling -------------------------------------------------------------------------------


def test_saved_with_its_decoder(tmp_path):
    heads = {"depth": nn.Linear(3, 4)}
    model, x = decoding(heads=heads, tasks=TASKS)
    model.save_pretrained(tmp_path)
    fresh = {"heads": {"depth": nn.Linear(3, 4).double()}, "decoder": Mixing().double()}
    again = dtme.MultiTaskModel.from_pretrained(tmp_path, OwnTransformer().double(), **fresh).eval()
    assert same_predictions(again(x), model(x)) and again.tasks == TASKS
    assert any(name.startswith("decoder.out.") for name in again.state_dict())
    for given, says in (
        ({"heads": fresh["heads"]}, "was saved with the decoder Mixing: give from_pretrained"),
        ({"decoder": Mixing().double()}, r"holds heads for \['depth'\], but heads are for \[\]"),
        (fresh | {"decoder": dict}, "which the model does not have"),
        (fresh | {"decoder": Separate().double()}, "holds 'decoder.out.semseg.weight' as"),
    ):
        backbone = OwnTransformer().double()
        with pytest.raises(ValueError, match=says):
            dtme.MultiTaskModel.from_pretrained(tmp_path, backbone, **given)
        assert not dtme.is_expanded(backbone)


def test_what_was_added_goes_into_the_same_pretrained_model_with_a_decoder(tmp_path):
    model, x = decoding()
    model.save_pretrained(tmp_path, expansion_only=True)
    pretrained = dtme.collapse(copy.deepcopy(model))
    again = dtme.MultiTaskModel.from_pretrained(tmp_path, pretrained.backbone, decoder=pretrained.decoder).eval()
    assert same_predictions(again(x), model(x))


def test_saved_without_weights_of_a_decoder_or_without_one(tmp_path):
    def together(features):
        return {task: found + sum(features.values()) for task, found in features.items()}

    model, x = decoding(together)
    model.save_pretrained(tmp_path / "function")
    again = dtme.MultiTaskModel.from_pretrained(tmp_path / "function", OwnTransformer().double(), decoder=together)
    assert same_predictions(again.eval()(x), model(x)) and again.tasks == TASKS
    heads = {"depth": nn.Identity()}
    dtme.MultiTaskModel(OwnTransformer(), heads).save_pretrained(tmp_path / "heads")
    config = json.loads((tmp_path / "heads" / "dtme_config.json").read_text())
    assert "decoder" not in config and "heads" not in config  # as earlier releases wrote it
    with pytest.raises(ValueError, match="was saved without a decoder, but the decoder together is given"):
        dtme.MultiTaskModel.from_pretrained(tmp_path / "heads", OwnTransformer(), heads, decoder=together)


def test_one_task_is_exported_where_it_needs_no_other():
    heads = {"depth": nn.Linear(2, 3)}
    model, x = decoding(Separate(), heads, depth=1, tasks=TASKS)
    with pytest.raises(RuntimeError, match=r"the decoder Separate has to be tried .* call the model once"):
        model.export_task("depth")
    with torch.inference_mode():
        model(x)
        model.export_task("depth")
    assert all(like.is_meta for like in dtme.trees.tensors(model._example))
    state = torch.get_rng_state()
    single = model.export_task("depth")
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(single(x), model(x, "depth")["depth"], rtol=1e-12, atol=1e-12)
    program = torch.export.export(single, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
    other = make_input("own", 5, seed=4)
    torch.testing.assert_close(program.module()(other), single(other), rtol=1e-10, atol=1e-10)


class Weighed(nn.Module):
    """All tasks' features, weighed by what happens to be zero."""

    def __init__(self, detaches):
        super().__init__()
        self.weight, self.detaches = nn.Parameter(torch.zeros(())), detaches

    def forward(self, features):
        total = sum(found.mean((1, 2), keepdim=True) for found in features.values())
        return self.weight * (total.detach() if self.detaches else total)


@pytest.mark.parametrize(
    ("decoder", "says"),
    [
        (Mixing(), "decoder Mixing reads the features of other tasks"),
        (Separate(Weighed(False)), "decoder Separate reads the features of other tasks"),
        (Separate(Weighed(True)), "decoder Separate lets the features of other tasks change it"),
        (Separate(lambda features: len(features)), "decoder Separate predicts something else .* of that task alone"),
        (lambda f: {t: f["semseg"].detach() * 0 + f[t] for t in TASKS}, "<lambda> lets the features of other"),
        (lambda f: {t: f[t] for t in TASKS}, "raises KeyError when it is given the features of 'depth' alone"),
    ],
)
def test_one_task_is_not_exported_where_it_may_need_others(decoder, says):
    model, x = decoding(decoder, tasks=TASKS)
    if isinstance(decoder, Separate) and isinstance(decoder.cross, Weighed):
        nn.init.zeros_(model.decoder.cross.weight)
    model(x)
    with pytest.raises(RuntimeError, match=f"'depth' cannot be exported alone, because the .*{says}"):
        model.export_task("depth")


def test_copies_predict_the_same_and_all_parameters_are_found(capsys):
    model, x = decoding()
    want = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same_predictions(other(x), want) and other.decoder is not model.decoder
    assert dtme.verify(model, x) < 1e-12 and dtme.verify(model, x, "depth") < 1e-12
    in_groups = [parameter for group in model.parameter_groups() for parameter in group["params"]]
    assert {id(p) for p in in_groups} == {id(p) for p in model.parameters()} and len(in_groups) == len(set(in_groups))
    model.print_trainable_parameters()
    assert f"of {sum(p.numel() for p in model.parameters()):,} parameters" in capsys.readouterr().out
    dtme.collapse(model)
    alike = model(x)
    assert model.tasks == TASKS and not dtme.is_expanded(model) and not same_predictions(alike, want)


def test_verify_sees_streams_that_differ(monkeypatch):
    """Not only that one decoder is given the same features twice."""
    model, x = decoding()
    extract = dtme.MultiTaskModel.extract
    model(x)

    def wrong(self, x, selected):
        found = extract(self, x, selected)
        return {task: value + (len(selected) == 1) for task, value in found.items()}

    monkeypatch.setattr(dtme.MultiTaskModel, "extract", wrong)
    assert dtme.verify(model, x) > 1e-3


def test_compiles_in_one_graph_with_gradients_and_without():
    model, x = decoding(depth=1)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    want, got = model(x), compiled(x)
    assert counter.frame_count == 1
    for task in TASKS:
        torch.testing.assert_close(got[task], want[task], rtol=1e-10, atol=1e-10)
    parameters = list(model.parameters())
    for a, b in zip(*(torch.autograd.grad(loss_of(p), parameters) for p in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, "depth")["depth"], want["depth"], rtol=1e-10, atol=1e-10)
    assert counter.frame_count == 2
    torch._dynamo.reset()


def test_compiled_for_one_task_of_those_that_the_backbone_has():
    """It runs in the graph that may serve any task; the decoder is given it under its own name."""
    model, x = decoding(depth=1)
    some = dtme.MultiTaskModel(
        model.backbone, decoder=lambda f: {t: (list(f), v) for t, v in f.items()}, tasks=["depth"]
    )
    torch._dynamo.reset()
    with torch.no_grad(), dtme.tasks(model.backbone, "depth"):
        names, value = torch.compile(some, backend="eager", fullgraph=True)(x)["depth"]
        torch.testing.assert_close(value, model.backbone(x), rtol=1e-10, atol=1e-10)
    assert names == ["depth"]
    torch._dynamo.reset()
