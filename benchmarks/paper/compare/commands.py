"""The command line that runs a folder again."""

import shlex
from typing import Any

from ..report.text import setting as said
from ..runner.config import Config
from .folders import RANDOM, Setting

COMMAND = "python -m benchmarks.paper compare-report"
RENAMED = {"seed": "data-seed"}
"""Data options whose option of the command has another name."""
NO_OPTION = ("data", "options", "conflicts")
"""Settings that are options of another form."""


def run_command(setting: Setting) -> str:
    """``python -m benchmarks.paper run ...`` with the folder's settings; files and folders by their names only."""
    folder, settings = setting.folder, setting.settings
    defaults = Config("", 0).settings
    words = ["python", "-m", "benchmarks.paper", "run", folder.experiment, "--data", folder.data]
    options = settings.get("options") or {}
    for name, value in options.items():
        if value != defaults["options"].get(name):
            words += _option(RENAMED.get(name, name), value)
    for name, value in settings.items():
        if name not in NO_OPTION and value != defaults.get(name):
            words += _option(name, value)
    if setting.lr == setting.lr:  # not NaN
        words += ["--lr", f"{setting.lr:g}"]
    if settings.get("conflicts") is False:
        words.append("--no-conflicts")
    if setting.tuned:
        words.append("--tune")
    words += ["--seeds", f"{max(folder.seeds, default=0) + 1}"]
    words += ["--arms", *(name for name in setting.arms if name != RANDOM)]
    return shlex.join([*words, "--out", setting.path.resolve().name])


def _option(name: str, value: Any) -> list[str]:
    if value is None:
        return []
    values = value if isinstance(value, list | tuple) else [value]
    return [f"--{name.replace('_', '-')}", *(said(one) if isinstance(one, str) else f"{one}" for one in values)]
