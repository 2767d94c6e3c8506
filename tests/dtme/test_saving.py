"""Saved folders: the same model again, and never half of one."""

import copy
import json

import pytest
import torch
from torch import nn

import dtme
from benchmarks.stacks import quantised
from tests.dtme.clients import CLIENTS, TASKS, WIDTH, OwnTransformer, mixed_plan, same_predictions


def fresh(client):
    torch.manual_seed(99)
    return CLIENTS[client]().double(), {task: nn.Linear(WIDTH, 2 + i).double() for i, task in enumerate(TASKS)}


@pytest.mark.parametrize("client", CLIENTS)
def test_saved_model_predicts_the_same_bits(expanded, tmp_path, client):
    model, x = expanded(client)
    model.save_pretrained(tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["dtme_config.json", "model.safetensors"]
    again = dtme.MultiTaskModel.from_pretrained(tmp_path / "run", *fresh(client)).eval()
    assert same_predictions(model(x), again(x)) and list(again.state_dict()) == list(model.state_dict())


def test_expansion_only_is_small_and_goes_into_the_same_pretrained_model(build, randomise, tmp_path):
    model, x = build()
    dtme.expand(model, mixed_plan(model))
    randomise(model)
    model.save_pretrained(tmp_path / "full")
    model.save_pretrained(tmp_path / "added", expansion_only=True)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("full", "added")]
    assert sizes[1] < sizes[0] / 5
    pretrained, _ = build()
    again = dtme.MultiTaskModel.from_pretrained(tmp_path / "added", pretrained.backbone, pretrained.heads).eval()
    assert same_predictions(model(x), again(x))


def test_unexpanded_and_batch_norm_models_and_frozen_ones(build, tmp_path):
    model, x = build()
    model.save_pretrained(tmp_path)
    assert same_predictions(
        model(x), dtme.MultiTaskModel.from_pretrained(tmp_path, *fresh("transformers ViT")).eval()(x)
    )
    dtme.expand(model, mixed_plan(model), modulator="batch_norm", freeze_backbone=True)
    model.train()(x)
    model.eval().save_pretrained(tmp_path)  # over the earlier save
    again = dtme.MultiTaskModel.from_pretrained(tmp_path, *fresh("transformers ViT")).eval()
    assert same_predictions(model(x), again(x)) and not again.backbone.layers[0].mlp.fc1.weight.requires_grad


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


def test_what_was_not_tied_does_not_go_into_tied_weights(tmp_path):
    """One of the two values would be lost."""

    def heads(is_tied):
        first, second = nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 3)
        if is_tied:
            second.weight = first.weight
        return {"a": first, "b": second}

    dtme.MultiTaskModel(OwnTransformer(), heads(False)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"different 'heads.a.weight' and 'heads.b.weight'"):
        dtme.MultiTaskModel.from_pretrained(tmp_path, OwnTransformer(), heads(True))


def test_names_that_no_file_can_hold_are_refused_at_once():
    for make in (
        lambda name: dtme.ExpansionPlan([name]),
        lambda name: dtme.MultiTaskModel(nn.Identity(), {name: None}),
    ):
        with pytest.raises(ValueError, match="half of a character"):
            make("\ud800")


class Noted(nn.Linear):
    def get_extra_state(self):
        return {"a": "note"}

    def set_extra_state(self, state):
        pass


def test_what_no_file_of_tensors_holds_is_refused_by_name(tmp_path):
    with pytest.raises(RuntimeError, match=r"'heads.a._extra_state' is a dict"):
        dtme.MultiTaskModel(OwnTransformer(), {"a": Noted(WIDTH, 3)}).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"'heads.a.weight' is on the meta device"):
        model = dtme.MultiTaskModel(OwnTransformer(), {"a": nn.Linear(WIDTH, 3, device="meta")})
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore")
def test_quantised_weights_are_neither_saved_nor_loaded_into(tmp_path):
    pytest.importorskip("torchao")
    heads = {"a": nn.Linear(quantised.WIDTH, 3)}
    plan = quantised.plan_of(quantised.vit())
    plan = dtme.ExpansionPlan(["a"], 2, {block: ["a"] for block in plan.blocks})
    model = dtme.expand(dtme.MultiTaskModel(quantised.base(quantised.weights), heads), plan)
    with pytest.raises(RuntimeError, match=r"'backbone.*' \(Int8Tensor\) is quantised.*expansion_only=True"):
        model.save_pretrained(tmp_path)
    plain = quantised.vit(dtype=torch.float32, width=quantised.WIDTH)
    dtme.expand(dtme.MultiTaskModel(plain, heads), plan).save_pretrained(tmp_path)
    dtme.collapse(model)
    with pytest.raises(ValueError, match="load, and quantise after that"):
        dtme.MultiTaskModel.from_pretrained(tmp_path, model.backbone, heads)
    assert not dtme.is_expanded(model)


def test_conjugates_are_tensors_of_their_own(tmp_path):
    def head():
        linear = nn.Linear(WIDTH, 3)
        linear.register_buffer("z", torch.randn(3, dtype=torch.complex64))
        linear.register_buffer("conjugate", linear.z.conj())
        return linear

    model = dtme.MultiTaskModel(OwnTransformer(), {"a": head()})
    model.save_pretrained(tmp_path)
    again = dtme.MultiTaskModel.from_pretrained(tmp_path, OwnTransformer(), {"a": head()})
    assert torch.equal(again.heads["a"].conjugate.resolve_conj(), model.heads["a"].z.conj().resolve_conj())


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
        (rewrite(tasks=["a", "b"]), ValueError, r"dtme_config.json was changed, .* its 'tasks' is \['a', 'b'\]"),
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

    for stop in range(1, 7):
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
        assert same_predictions(again(x), (old if stop <= 2 else new)(x)), stop
        assert sorted(p.name for p in tmp_path.iterdir()) == ["dtme_config.json", "model.safetensors"]


def test_training_resumes_bit_for_bit(build, tmp_path):
    def train(model, optimizer, steps, x):
        for _ in range(steps):
            optimizer.zero_grad()
            sum(p.square().mean() for p in model(x).values()).backward()
            optimizer.step()

    def start():
        model, x = build()
        dtme.expand(model, mixed_plan(model))
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
    assert same_predictions(straight(x), resumed(x))


def test_meta_models_are_refused(expanded, tmp_path):
    model, _ = expanded()
    model.save_pretrained(tmp_path)
    backbone, heads = fresh("transformers ViT")
    with pytest.raises(ValueError, match="not meta"):
        dtme.MultiTaskModel.from_pretrained(tmp_path, backbone.to("meta"), heads)
