"""Masked reconstruction: it learns, leaves a backbone that the runner takes, and refuses what it cannot do."""

import re

import pytest
import torch

from benchmarks.clients import import_torchvision
from benchmarks.paper.__main__ import main
from benchmarks.paper.models import NARROW_IMAGE, is_pretrained


def pretrain(out, *options, steps=30):
    sizes = ["--size", "32", "--train", "16", "--batch", "8", "--cache", str(out.parent / "cache")]
    return main(["pretrain", "--out", str(out), "--steps", str(steps), *sizes, *options])


def test_it_learns_repeats_and_is_taken_by_the_runner(tmp_path, capsys):
    for name in ("first", "again"):
        pretrain(tmp_path / name)
    first, last = map(float, re.search(r"([\d.]+) at first, ([\d.]+) at last", capsys.readouterr().out).groups())
    assert last < 0.9 * first
    import_torchvision()
    from transformers import AutoModel

    models = [AutoModel.from_pretrained(tmp_path / name).state_dict() for name in ("first", "again")]
    same = [name for name in models[0] if not name.startswith("pooler")]
    assert all(torch.equal(models[0][name], models[1][name]) for name in same)
    width = NARROW_IMAGE["hidden_size"]
    assert models[0]["embeddings.position_embeddings"].shape == (1, 17, width) and is_pretrained(
        str(tmp_path / "first")
    )
    sizes = ["--size", "32", "--train", "8", "--val", "4", "--batch", "4", "--steps", "2", "--read", "4"]
    out = tmp_path / "runs"
    command = ["run", "pilot", "--arms", "joint", "--jobs", "1", *sizes, "--no-conflicts", "--out", str(out)]
    assert main([*command, "--backbone", str(tmp_path / "first"), "--cache", str(tmp_path / "cache")]) == 0
    assert (out / "runs" / "joint.seed-0.json").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--size", "30"], "--size must be a multiple of the patches' 8 pixels, got 30"),
        (["--lr", "0"], "--lr must be positive, got 0.0"),
        (["--lr", "1e30"], "take a lower --lr than 1e+30"),
    ],
)
def test_what_it_cannot_do_is_one_line(tmp_path, options, message):
    with pytest.raises(SystemExit, match=re.escape(message)):
        pretrain(tmp_path / "out", *options, steps=3)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_there_stays(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(SystemExit, match="is there already: name another folder"):
        pretrain(tmp_path / "out")
