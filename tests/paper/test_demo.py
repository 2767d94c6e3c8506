"""The demo in small: it runs through, leaves everything it promises, repeats with its seed, and names what is wrong."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

import dtme
from benchmarks.paper.__main__ import main
from benchmarks.paper.data import Options, open_data
from benchmarks.paper.data.rooms import DEMO_TASKS
from benchmarks.paper.models import load_backbone

FILES = {"conflicts.png", "conflict_map.png", "losses.png", "predictions.png", "report.json", "plan.json", "model"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was made for 32 × 32 pixels."""
    folder = tmp_path_factory.mktemp("vit")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    transformers.ViTModel(transformers.ViTConfig(image_size=32, patch_size=8, **sizes)).save_pretrained(folder)
    return folder


def run(folder, cache, *options):
    fixed = ["--steps", "3", "--scenes", "24", "--batch", "8", "--device", "cpu"]
    main(["demo", *fixed, "--out", str(folder), "--cache", str(cache), *map(str, options)])
    return json.loads((folder / "report.json").read_text())


def test_demo_runs_through_and_repeats_with_its_seed(tmp_path, cache, capsys):
    report = run(tmp_path / "a", cache, "--seed", "5")
    printed = capsys.readouterr().out
    assert {path.name for path in (tmp_path / "a").iterdir()} == FILES
    for task in DEMO_TASKS:  # a row with three metrics, their difference and its share of Δm
        (row,) = [line for line in printed.splitlines() if line.startswith(f"{task} ")]
        assert len(row.split()) >= 8
    assert "64 × 64 pixels" in printed
    assert "the same bits" in printed and "range rate" in printed and "added 12,288" in printed
    plan = dtme.ExpansionPlan.load(tmp_path / "a" / "plan.json")
    assert plan.tasks == DEMO_TASKS and len(plan.modulation) == len(plan.expansion) == 3
    # where the rooms come from, rendered or kept, does not matter
    assert run(tmp_path / "b", cache, "--seed", "5") == report != run(tmp_path / "c", cache, "--seed", "6")
    weights = [load_file(tmp_path / out / "model" / "model.safetensors") for out in "abc"]
    same = [all(torch.equal(weights[0][name], other[name]) for name in weights[0]) for other in weights[1:]]
    assert same == [True, False]


@pytest.mark.parametrize(("options", "side"), [((), 32), (("--size", 48), 48)])
def test_any_size_of_a_pretrained_backbone(tmp_path, cache, pretrained, capsys, options, side):
    run(tmp_path / "out", cache, "--backbone", pretrained, *options)
    printed = capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    assert f"ViTModel on cpu, {side} × {side} pixels" in printed and "the same bits" in printed


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--steps", "0"), "must be positive"),
        (("--size", "20"), "patches of 8 pixels do not tile 20 × 20, try 24 24"),
        (("--size", "8"), "each at least 16 pixels"),
        (("--size", "0"), "each at least 16 pixels"),
        (("--lr", "0"), "--lr must be a positive number, got 0"),
        (("--lr", "-0.1"), "--lr must be a positive number, got -0.1"),  # which would climb
        (("--lr", "nan"), "--lr must be a positive number, got nan"),
        (("--device", "tpu9"), "--device tpu9 cannot be used here"),
        (("--backbone", "/no/such/model"), "--backbone /no/such/model cannot be loaded"),
        (("--backbone", "/no/such/model", "--size", "32"), "--backbone /no/such/model cannot be loaded"),
        (("--backbone", "/no/such/model", "--out", __file__), r"--out .*test_demo\.py cannot be made"),
    ],
)
def test_demo_refuses(tmp_path, cache, options, says):
    with pytest.raises(SystemExit, match=says):
        run(tmp_path, cache, *options)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("vit-tiny", "--backbone vit-tiny looks at images, and the data set holds texts"),
        (None, "ViTModel has no vocab_size in its config: it reads no texts"),
    ],
)
def test_what_looks_at_images_reads_no_texts(pretrained, name, says):
    with pytest.raises(ValueError, match=says):
        load_backbone(name or str(pretrained), None, 100)


def test_a_size_that_the_backbone_itself_refuses(tmp_path, cache):
    """One without positions for other sizes: the error says which option it is about."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.ViTMSNConfig(image_size=32, patch_size=8, num_channels=4, **sizes)
    transformers.ViTMSNModel(config).save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit, match=r"--backbone .*model does not take images of 48 × 48 pixels: .*channel"):
        run(tmp_path, cache, "--backbone", tmp_path / "model", "--size", "48")


@pytest.mark.parametrize(("kind", "what"), [("image", "image"), ("depth", "label 'depth'")])
def test_a_scene_that_is_not_finite_is_named_and_no_block(tmp_path, pretrained, kind, what):
    data = open_data("rooms", Options(size=(32, 32), train=24, val=3, cache=tmp_path))
    records = np.load(data.train.path, mmap_mode="r+")
    records[kind][5, 0, 7, 8:10] = np.nan
    records.flush()
    numbers = records[kind][0].size
    with pytest.raises(ValueError, match=rf"'train' whose {what} is not finite, .* {numbers} numbers: 5 \(2\)$"):
        run(tmp_path / "out", tmp_path, "--backbone", pretrained)


def test_a_loss_that_is_not_finite_is_named_with_its_step_and_scenes(tmp_path, cache, pretrained):
    with pytest.raises(ValueError, match=r"joint training, step [12]: the loss of '.* \(scenes \d+(, \d+){7}\)"):
        run(tmp_path / "out", cache, "--backbone", pretrained, "--lr", "1e30")
