"""The README's code runs as printed."""

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from tests.dtme.clients import CLIENTS, WIDTH

README = Path(__file__).parents[1] / "README.md"


def test_the_example_runs_as_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    torch.manual_seed(0)
    channels = {"semseg": 5, "depth": 1}
    names = {
        "torch": torch,
        "backbone": CLIENTS["transformers ViT"](),
        "heads": {task: nn.Linear(WIDTH, c) for task, c in channels.items()},
        "losses": dict.fromkeys(channels, F.mse_loss),
        "loader": [(torch.randn(2, 3, 16, 16), {t: torch.randn(2, 5, c) for t, c in channels.items()})] * 2,
    }
    exec(code, names)
    assert "range rate" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"conflicts.png", "plan.json", "run1"}
    torch.testing.assert_close(names["single"](names["x"]), names["model"].eval()(names["x"], "depth")["depth"])


def test_pictures_and_paths_it_names_exist():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README.read_text()):
        assert (README.parent / path).is_file(), path
