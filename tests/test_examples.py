"""The examples run as they are, and what they predict equals plain models with the task tokens concatenated."""

import copy
import importlib
import re
import runpy
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import dtme
from dtme.trees import map_tensors, tensors

FOLDER = Path(__file__).parents[1] / "examples"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))
LIKE = [name for name in NAMES if name.endswith("_like")]
"""Models of images with decoders of their own."""


def printed(name, capsys):
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


def in_folder(name, folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", [name, str(folder)])
    return printed(name, capsys)


@pytest.mark.parametrize("name", LIKE)
def test_runs_as_a_script(name, capsys):
    out = printed(name, capsys)
    assert "range rate" in out and "reloaded: the same predictions" in out


def test_text_goes_through_everything(tmp_path, capsys, monkeypatch):
    out = in_folder("text", tmp_path, capsys, monkeypatch)
    assert {path.name for path in tmp_path.iterdir()} == {"conflicts.png", "sentence.png", "model"}
    assert "range rate" in out and "reloaded: the same predictions" in out
    assert "4 analyses in 64 steps" in out and "failed" not in out and "pull apart most at" in out
    first, last = (float(line.split()[1].rstrip(",")) for line in out.splitlines() if line.startswith("loss "))
    assert last < first < 3


def test_callbacks_run_in_the_libraries_that_are_here(capsys):
    out = printed("callbacks", capsys)
    for library, needed in (("transformers", "transformers"), ("lightning", "lightning")):
        said = "is not installed: its callback was not run" if find_spec(needed) is None else ": "
        assert f"{library}{said}" in out or f"{library} {said}" in out
    ran = sum(find_spec(library) is not None for library in ("transformers", "lightning"))
    assert out.count("3 analyses in 30 steps") == ran and "failed" not in out


@pytest.mark.filterwarnings("ignore")
def test_trainer_resumes_from_a_saved_model(tmp_path, capsys, monkeypatch):
    pytest.importorskip("accelerate")
    out = in_folder("trainer", tmp_path, capsys, monkeypatch)
    assert "range rate" in out and "resumed half way: the same weights" in out
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-30", "checkpoint-60", "resumed"}
    losses = [float(loss) for loss in re.findall(r"'loss_colour': '([\d.]+)'", out)]
    assert len(losses) == 6 and losses[3] < losses[0] / 3 and losses[2:4] == losses[4:]


@pytest.mark.filterwarnings("ignore")
def test_lightning_takes_its_plan_from_a_checkpoint(tmp_path, capsys, monkeypatch):
    pytest.importorskip("lightning")
    out = in_folder("lightning_module", tmp_path, capsys, monkeypatch)
    assert "range rate" in out and "loaded: the same predictions" in out
    first, last = (float(loss) for loss in re.findall(r"'val': '([\d.]+)'", out))
    assert last < 0.8 * first


@pytest.mark.filterwarnings("ignore")
def test_accelerate_goes_on_half_way(tmp_path, capsys, monkeypatch):
    pytest.importorskip("accelerate")
    out = in_folder("accelerate_loop", tmp_path, capsys, monkeypatch)
    assert "range rate" in out and "resumed half way: the same weights" in out
    ends = [(float(first), float(last)) for first, last in re.findall(r"([\d.]+) to ([\d.]+) in \d+ batches", out)]
    assert len(ends) == 6 and all(last < first / 2 for first, last in ends[:3])


@pytest.mark.filterwarnings("ignore")
def test_torchjd_combines_what_is_shared(capsys):
    pytest.importorskip("torchjd")
    out = printed("torchjd_aggregators", capsys)
    left_out = out.count("left out")
    rows = re.findall(r"^ +\w+((?: +\d\.\d+){3})$", out, re.MULTILINE)
    assert len(rows) + left_out == 11 and len(rows) >= 7
    assert all(float(row.split()[1]) < 0.2 for row in rows)


def test_every_example_is_run():
    assert set(NAMES) == {
        *LIKE,
        "accelerate_loop",
        "callbacks",
        "compare",
        "export",
        "fsdp2",
        "lightning_module",
        "lora",
        "text",
        "torchjd_aggregators",
        "trainer",
    }


def test_a_comparison_says_what_to_do_next(capsys):
    out = printed("compare", capsys)
    assert re.findall(r"^(\w+) .* ×  ", out, re.MULTILINE) == ["joint", "longer", "conflict", "random", "lora"]
    assert out.count("Is conflict better than") == 4 and out.splitlines()[-1].startswith("Next: ")


def test_a_task_leaves(capfd):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    out = printed("export", capfd)
    assert "a process without dtme: (5, 17, 2)" in out and "torch.export and ONNX Runtime: the same depth" in out


def test_under_lora(capsys):
    pytest.importorskip("peft")
    out = printed("lora", capsys)
    first, last = (float(x.split()[0]) for x in out.partition("\nloss ")[2].split(", ")[:2])
    assert last < 0.5 * first and "range rate" in out and "merged: the same predictions" in out


def test_two_processes_share_the_weights_and_one_loads_them(capfd):
    runpy.run_path(str(FOLDER / "fsdp2.py"), run_name="__main__")
    out = capfd.readouterr().out
    assert "2 processes" in out and "range rate" in out and "reloaded in one process: the same predictions" in out
    losses = [float(line.split()[1]) for line in out.splitlines() if line.startswith("loss ")]
    assert len(losses) == 4 and losses[1] < losses[0] and losses[3] < losses[2]


def mixed_plan(model, width, with_tokens):
    """Streams part at different blocks, and not every task has every module."""
    first, second, third, fourth = (
        name for name, _ in model.backbone.named_modules() if name.rpartition(".")[0] in ("blocks", "layers")
    )
    tasks = model.tasks
    modulation = {first: tasks[1:2], second: tasks, fourth: tasks[:2]}
    expansion = {second: tasks, third: tasks[:2]} if with_tokens else {}
    widths = dict.fromkeys((first, second, third, fourth), width)
    return dtme.ExpansionPlan(tasks, 2, modulation, expansion, widths)


@contextmanager
def concatenated(backbone, added, task):
    """Blocks get their modulated tokens and behind them the task's own, which their outputs are rid of again."""
    handles = []
    for name, block in backbone.named_modules():
        weight, bias, tokens = (added.get(f"{name}.dtme.{kind}.{task}") for kind in ("weight", "bias", "tokens"))

        def enter(block, args, weight=weight, bias=bias, tokens=tokens):
            (x,) = args
            x = x if weight is None else x * weight + bias
            return x if tokens is None else torch.cat([x, tokens.expand(len(x), -1, -1)], 1)

        def leave(block, args, output, tokens=tokens):
            if tokens is None:
                return None
            length = args[0].shape[1] - len(tokens)
            # maps (rows, heads, N, N) between the tokens, or the tokens (rows, N, p)
            return map_tensors(lambda y: y[..., :length, :length] if y.ndim == 4 else y[:, :length], output)

        if weight is not None or tokens is not None:
            handles += [block.register_forward_pre_hook(enter), block.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def loss_of(predictions):
    return sum((i + 1) * y.square().mean() for i, y in enumerate(tensors(predictions)))


@pytest.mark.parametrize("with_tokens", [False, True], ids=["modulation", "modulation and task tokens"])
@pytest.mark.parametrize("name", LIKE)
def test_equals_the_plain_model_with_concatenated_task_tokens(name, with_tokens):
    example = importlib.import_module(f"examples.{name}")
    torch.manual_seed(0)
    model = dtme.MultiTaskModel(**example.parts()).double().eval()
    plain = copy.deepcopy(model)
    dtme.expand(model, mixed_plan(model, example.WIDTH, with_tokens))
    with torch.no_grad():  # far from the identity, and from uniform attention
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    parameters = dict(model.named_parameters())
    own = {key: value for key, value in parameters.items() if ".dtme." not in key}
    plain.load_state_dict(own, strict=False)
    added = {key.removeprefix("backbone."): value for key, value in parameters.items() if ".dtme." in key}
    images = torch.randn(3, 3, 32, 32).double()

    features = {}
    for task in model.tasks:
        with concatenated(plain.backbone, added, task):
            features |= plain.extract(images, (task,))
    want, got = plain.predict(features, model.tasks), model(images)
    assert got.keys() == want.keys() and dtme.sharing_of(model) == "shared prefix"
    for a, b in zip(tensors(got), tensors(want), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    of_plain = dict(plain.named_parameters()) | {f"backbone.{key}": value for key, value in added.items()}
    ours = torch.autograd.grad(loss_of(got), list(parameters.values()))
    naive = torch.autograd.grad(loss_of(want), [of_plain[key] for key in parameters])
    for key, a, b in zip(parameters, ours, naive, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda m, key=key: f"{key}: {m}")
