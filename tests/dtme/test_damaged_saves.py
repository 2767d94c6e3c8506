"""Saved models that a disk, a hand or another program has changed: refused by name, or what was saved."""

import json
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import dtme

TASKS, CONFIG, WEIGHTS = ("a", "b"), "dtme_config.json", "model.safetensors"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.attn, self.mlp = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return x + self.mlp(self.attn(self.norm1(x)))


def parts():
    return nn.Sequential(Block(), Block()), {task: nn.Linear(4, 2) for task in TASKS}


class Saved:
    """A model, the folder that it was saved in, and what lies there when nobody has changed it."""

    def __init__(self, folder):
        torch.manual_seed(0)
        self.folder, self.model = folder, dtme.MultiTaskModel(*parts())
        self.model.heads["b"].weight = self.model.heads["a"].weight
        dtme.expand(self.model, dtme.ExpansionPlan(TASKS, 2, {"0": TASKS, "1": ("a",)}))
        self.model.save_pretrained(folder)
        self.files = {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}
        self.tensors = load_file(folder / WEIGHTS)
        with safe_open(folder / WEIGHTS, "pt") as file:
            self.metadata = file.metadata()
        self.given = parts()
        self.before = self.state_of_given()

    def restore(self):
        for name, data in self.files.items():
            (self.folder / name).write_bytes(data)

    def rewrite(self, **change):
        path = self.folder / CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | change))

    def recarry(self, change):
        """Weights whose own config was changed."""
        carried = json.dumps(change(json.loads(self.metadata["dtme"])))
        save_file(self.tensors, self.folder / WEIGHTS, {**self.metadata, "dtme": carried})

    def as_version_1(self):
        """The folder as releases without checksums wrote it."""
        config = json.loads(self.files[CONFIG])
        plain = {name: value for name, value in config.items() if name not in ("release", "checksum")}
        (self.folder / CONFIG).write_text(json.dumps(plain | {"version": 1}))
        carried = {name: value for name, value in plain.items() if name not in ("format", "version")}
        save_file(self.tensors, self.folder / WEIGHTS, {"format": "pt", "dtme": json.dumps(carried)})

    def state_of_given(self):
        backbone, heads = self.given
        everything = nn.ModuleList([backbone, *heads.values()])
        flags = {name: parameter.requires_grad for name, parameter in everything.named_parameters()}
        return {name: value.clone() for name, value in everything.state_dict().items()}, flags

    def is_as_before(self):
        before, flags = self.before
        everything = nn.ModuleList([self.given[0], *self.given[1].values()])
        state = everything.state_dict()
        same = state.keys() == before.keys() and all(torch.equal(value, before[name]) for name, value in state.items())
        return same and flags == {name: parameter.requires_grad for name, parameter in everything.named_parameters()}

    def load(self):
        """None where loading was refused by name with what was given as it was; else whether all is what was saved."""
        try:
            again = dtme.MultiTaskModel.from_pretrained(self.folder, *self.given)
        except (ValueError, FileNotFoundError) as error:
            assert type(error) in (ValueError, FileNotFoundError) and str(self.folder) in str(error), error
            assert self.is_as_before()
            return None
        self.given = parts()
        self.before = self.state_of_given()
        state, want = again.state_dict(), self.model.state_dict()
        return state.keys() == want.keys() and all(torch.equal(value, want[name]) for name, value in state.items())


@pytest.fixture
def saved(tmp_path):
    return Saved(tmp_path / "run")


def test_no_flipped_bit_of_any_file_loads_something_else(saved):
    """Every byte of the header and some of the data and of the config, another bit each."""
    header = 8 + int.from_bytes(saved.files[WEIGHTS][:8], "little")
    refused = 0
    for name, data in saved.files.items():
        places = range(0, len(data), 3) if name == CONFIG else [*range(header), *range(header, len(data), 5)]
        for place in places:
            flipped = data[place] ^ 1 << place * 5 % 8
            (saved.folder / name).write_bytes(data[:place] + bytes([flipped]) + data[place + 1 :])
            found = saved.load()
            assert found in (None, True), (name, place)
            assert found is None or name == CONFIG or place < header, (name, place)
            refused += found is None
        saved.restore()
    assert refused > 1500 and saved.load()


def test_no_shorter_or_longer_file_loads_something_else(saved):
    for name, data in saved.files.items():
        for length in (0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1):
            (saved.folder / name).write_bytes(data[:length])
            assert saved.load() is None or (name == CONFIG and length == len(data) - 1)
        for more in (b"\0", b"}", data):
            (saved.folder / name).write_bytes(data + more)
            assert saved.load() is None
        saved.restore()


def test_an_edited_config_is_refused_and_the_field_is_named(saved):
    for name, value in (
        ("tasks", ["a", "c"]),
        ("features", "cls"),
        ("freeze_backbone", True),
        ("modulator", "batch_norm"),
        ("plan", dtme.ExpansionPlan(TASKS).as_dict()),
        ("gates", {"0": ["a"]}),
    ):
        saved.rewrite(**{name: value})
        with pytest.raises(ValueError, match=rf"{CONFIG} was changed, .* '{name}' .* This file is for people to read"):
            dtme.MultiTaskModel.from_pretrained(saved.folder, *saved.given)
        assert saved.load() is None
        saved.restore()
    saved.rewrite(tasks=["a", "c"], save="0" * 32)  # as if it were of another save
    with pytest.raises(ValueError, match=f"{CONFIG} is damaged, or was changed .* its checksum"):
        dtme.MultiTaskModel.from_pretrained(saved.folder, *saved.given)


def test_a_config_of_another_save_is_passed_over(saved):
    """One that is under way, or that was cut short between the two files."""
    other = dtme.MultiTaskModel(*parts())
    other.save_pretrained(saved.folder)
    (saved.folder / WEIGHTS).write_bytes(saved.files[WEIGHTS])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert saved.load()


def test_saves_of_earlier_releases_are_loaded_with_a_note(saved):
    saved.as_version_1()
    with pytest.warns(UserWarning, match="model.safetensors was saved by an earlier release, without checksums"):
        assert saved.load()


@pytest.mark.filterwarnings("ignore:.*without checksums")
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"aliases": {"backbone.0.attn.weight": "backbone.1.attn.weight"}}, "cannot stand for"),
        ({"aliases": {"heads.b.weight": "nowhere"}}, "cannot stand for"),
        ({"aliases": {"heads.b.weight": ["heads.a.weight"]}}, "aliases.* must be a non-empty string"),
        ({"tasks": [["a"], "b"]}, r"tasks\[0\] must be a non-empty string"),
        ({"features": 5}, "features must be one of"),
        ({"shared_prefix": 1}, "shared_prefix must be one of"),
        ({"plan": {"tasks": ["a", "b"]}}, "plan: lacks the field"),
        ({"plan": dtme.ExpansionPlan(TASKS, 2, {"9": ("a",)}).as_dict()}, "does not fit what was given: .* block '9'"),
        ({"gates": {"0": ["a"]}}, "gates of block '0' are for"),
        ({"surprise": 1}, "unknown field 'surprise'"),
        ({"digests": {}}, "lacks the field|is not a|checksums are missing"),
    ],
)
def test_every_field_is_checked_without_checksums_too(saved, change, says):
    saved.as_version_1()
    saved.rewrite(**change)
    carried = json.loads(saved.metadata["dtme"])
    for name in ("format", "version", "release", "checksum", "digests"):
        del carried[name]
    save_file(saved.tensors, saved.folder / WEIGHTS, {"format": "pt", "dtme": json.dumps(carried | change)})
    with pytest.raises(ValueError, match=says):
        dtme.MultiTaskModel.from_pretrained(saved.folder, *saved.given)
    assert saved.load() is None


@pytest.mark.filterwarnings("ignore:.*without checksums")
def test_whole_numbers_are_no_weights(saved):
    saved.tensors["backbone.0.attn.weight"] = saved.tensors["backbone.0.attn.weight"].int()
    saved.as_version_1()
    with pytest.raises(ValueError, match=r"'backbone.0.attn.weight' in torch.int32, the model needs torch.float32"):
        dtme.MultiTaskModel.from_pretrained(saved.folder, *saved.given)
    assert saved.load() is None


def test_other_tensors_under_the_same_config_are_refused(saved):
    name = "backbone.0.attn.weight"
    weight = saved.tensors[name]
    others = (weight.half(), weight.double(), weight[:2].clone(), weight / 0, weight.T.contiguous(), weight.view(2, 8))
    for other in others:
        save_file({**saved.tensors, name: other}, saved.folder / WEIGHTS, saved.metadata)
        with pytest.raises(ValueError, match=f"the checksum of '{name}' is not that which was saved"):
            dtme.MultiTaskModel.from_pretrained(saved.folder, *saved.given)
    swapped = {**saved.tensors, name: saved.tensors["backbone.1.attn.weight"], "backbone.1.attn.weight": weight}
    for tensors in (swapped, {k: v for k, v in saved.tensors.items() if k != name}, saved.tensors | {"x": weight + 1}):
        save_file(tensors, saved.folder / WEIGHTS, saved.metadata)
        assert saved.load() is None


def test_checksums_cannot_be_left_out(saved):
    for lost in ("checksum", "digests"):
        saved.recarry(lambda carried, lost=lost: {name: value for name, value in carried.items() if name != lost})
        with pytest.raises(ValueError, match=f"{WEIGHTS} is damaged: its checksums are missing"):
            dtme.MultiTaskModel.from_pretrained(saved.folder, *saved.given)
        assert saved.load() is None


def test_files_of_later_releases_say_what_to_do(saved):
    saved.rewrite(version=3, release="9.9")
    with pytest.raises(ValueError, match=f"{CONFIG} has version 3, written by release 9.9 .*: update dtme-kernels"):
        dtme.MultiTaskModel.from_pretrained(saved.folder, *saved.given)
    saved.restore()
    saved.recarry(lambda carried: carried | {"version": 3, "release": "9.9"})
    with pytest.raises(ValueError, match=f"{WEIGHTS} has version 3, written by release 9.9"):
        dtme.MultiTaskModel.from_pretrained(saved.folder, *saved.given)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a": ' * 50 + "1" + "}" * 50,
        '{"format": "dtme.MultiTaskModel", "format": "dtme.MultiTaskModel"}',
        '{"format": NaN}',
        '{"format": -Infinity}',
        '{"format": 1e999}',
        '{"format": ' + "1" * 5000 + "}",
        '{"format": "\\ud800"}',
        '{"\\ud800": 1}',
        "",
        "\xff",
        "null",
    ],
    ids=lambda text: text[:20],
)
def test_what_is_not_the_json_of_ours_is_refused_everywhere(saved, tmp_path, text):
    (tmp_path / "plan.json").write_bytes(text.encode("latin-1"))
    for kind in (dtme.ExpansionPlan, dtme.ConflictReport):
        with pytest.raises(ValueError, match=r"plan.json is not") as error:
            kind.load(tmp_path / "plan.json")
        assert type(error.value) is ValueError
    (saved.folder / CONFIG).write_bytes(text.encode("latin-1"))
    assert saved.load() is None
    saved.restore()
    save_file(saved.tensors, saved.folder / WEIGHTS, {**saved.metadata, "dtme": text})
    assert saved.load() is None


def test_not_a_number_is_a_weight_like_others(saved):
    with torch.no_grad():
        saved.model.backbone[0].attn.weight.fill_(float("nan"))
    saved.model.save_pretrained(saved.folder)
    again = dtme.MultiTaskModel.from_pretrained(saved.folder, *saved.given)
    assert again.backbone[0].attn.weight.isnan().all()
