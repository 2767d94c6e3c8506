"""Old releases of timm, which multi-task models pin, in environments of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RELEASES = sorted(ROOT.glob(".venv/timm-*"))


@pytest.mark.skipif(not RELEASES, reason="`make .venv/.ready` installs them")
@pytest.mark.parametrize("folder", RELEASES, ids=lambda folder: folder.name)
def test_task_tokens_equal_concatenation(folder):
    paths = os.pathsep.join(map(str, (folder, ROOT, ROOT / "python")))
    command = [sys.executable, "-W", "ignore", "-m", "tests.dtme.timm_release", folder.name.removeprefix("timm-")]
    run = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0 and run.stdout.strip() == "right", run.stderr
