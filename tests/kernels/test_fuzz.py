"""The fuzzer itself, on a few calls that are always the same."""

import pytest

from tests import fuzz


@pytest.mark.parametrize("run", [fuzz.public, fuzz.raw])
def test_nothing_is_wrong(run):
    kinds = {run(seed) for seed in range(100)}
    assert len(kinds) >= len(fuzz.PUBLIC)  # those that cannot be told apart are not tried


@pytest.mark.skipif("cpp" not in fuzz.OPERATORS["modulate"].kernels, reason="the extension is not built")
def test_a_wrong_result_is_seen(monkeypatch):
    """Else ``make fuzz`` would find nothing."""
    right = fuzz.OPERATORS["modulate"].kernels["cpp"]
    broken = right._replace(run=lambda *args: 1.5 * right.run(*args))
    monkeypatch.setitem(fuzz.OPERATORS["modulate"].kernels, "cpp", broken)
    for run in (fuzz.public, fuzz.raw):
        with pytest.raises(fuzz.Wrong, match="modulate"):
            for seed in range(200):
                run(seed)
