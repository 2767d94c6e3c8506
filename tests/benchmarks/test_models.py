"""The sweep of models: one row of each kind, and the harness itself on models made to go wrong."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("timm")
pytest.importorskip("transformers")

from benchmarks.models import checks, models, oracle, runner, table
from benchmarks.models.subject import Subject

ROWS = {
    "timm/vision_transformer": "right",
    "timm/swin_transformer": "right",
    "transformers/vit": "right",
    "transformers/bert": "right",
    "transformers/llama": "right",
    "transformers/swin": "right",
    "transformers/clip": "right",
    "transformers/wav2vec2": "right",
    "transformers/t5": "refused",
    "transformers/bart": "right",
    "torch/TransformerDecoder": "right",
    "transformers/albert": "right",
    "torchvision/vit": "right",
    "torch/TransformerEncoder": "right",
    "torch/TransformerEncoder, padding mask": "right",
}
"""The least that task tokens must come to: right, or refused, where right is as good."""


@pytest.fixture(scope="module", autouse=True)
def _libraries() -> Iterator[None]:
    threads = torch.get_num_threads()
    models.prepare()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_each_kind(name: str) -> None:
    rows = {row["plan"]: row for row in models.rows(name)}
    assert rows["modulation"]["outcome"] in ("right", "refused"), rows["modulation"]
    least = ("right",) if ROWS[name] == "right" else ("right", "refused")
    assert rows["task tokens"]["outcome"] in least, rows["task tokens"]
    for row in rows.values():
        if row["outcome"] == "right":
            assert row["error"] < 1e-8 and row["gradient_error"] < 1e-3
        else:
            assert row["reason"]


# --- the harness ------------------------------------------------------------------------------------------------------


def _subject(name: str = "timm/vision_transformer") -> Subject:
    return models.build(name)


def test_the_oracles_of_task_tokens_agree() -> None:
    row = checks.check(_subject(), "task tokens")
    assert row["outcome"] == "right" and row["oracle"] == "keys and values, concatenation"
    assert row["oracle_error"] < 1e-12


def test_a_wrong_prediction_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks that get each other's rows, and a modulation that is not the oracle's."""
    import dtme.model

    together = dtme.model.run

    def mixed(*args: Any) -> dict[str, Any]:
        parts = together(*args)
        return dict(zip(parts, [*list(parts.values())[1:], *list(parts.values())[:1]], strict=True))

    with monkeypatch.context() as patch:
        patch.setattr(dtme.model, "run", mixed)
        row = checks.check(_subject(), "modulation")
        assert row["outcome"] == "wrong" and "together and alone differ" in row["reason"]

    with monkeypatch.context() as patch:
        patch.setattr(oracle, "channels_first", lambda block, x: False)
        added = {"blocks.0.dtme.weight.depth": torch.full((32,), 2.0), "blocks.0.dtme.bias.depth": torch.zeros(32)}
        patch.setattr(checks, "modulated", lambda naive, _, task: oracle.modulated(naive, added, "depth"))
        row = checks.check(_subject(), "modulation")
        assert row["outcome"] == "wrong" and "oracle differ" in row["reason"]


def test_an_error_from_inside_is_no_refusal() -> None:
    names = ["encoder.layers.0"]
    assert checks.is_refusal(ValueError("block 'encoder.layers.0' takes its tokens sequence first"), names)
    assert checks.is_refusal(ValueError("no transformer blocks were recognised in CNN: name them"), [])
    assert not checks.is_refusal(RuntimeError("The size of tensor a (4) must match the size of tensor b (12)"), names)
    assert not checks.is_refusal(AttributeError("block 'encoder.layers.0' has no attribute"), names)


def test_difference_sees_shapes_and_what_is_not_finite() -> None:
    a = torch.arange(4.0)
    assert checks.difference([a], [a]) == 0.0
    assert checks.difference([a], [a[:2]]) == float("inf")
    assert checks.difference([a], [a, a]) == float("inf")
    assert checks.difference([torch.tensor([1.0, float("nan")])], [torch.ones(2)]) == float("inf")
    assert checks.difference([a * 1.5], [a]) == pytest.approx(0.5)


def test_keys_that_read_several_tokens_have_no_oracle() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.mlp = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            keys = x.cumsum(1)
            return self.mlp(x + self.attn(x, keys, keys, need_weights=False)[0])

    model = nn.Sequential(Mixing()).double()
    subject = Subject("own", model, lambda rows: torch.randn(rows, 5, 8, dtype=torch.float64), 2)
    with pytest.raises(oracle.NoOracle, match="read by 10 keys"), torch.no_grad(), checks._slow_path():
        oracle.keys_values(subject, model, "0", torch.randn(2, 8, dtype=torch.float64))


def test_a_key_is_found_whatever_the_order_of_its_heads() -> None:
    for shape, heads in (((2, 4, 7, 8), 1), ((2, 3, 4, 7, 8), 2), ((2, 4, 3, 7, 8), 1)):
        different = torch.zeros(shape, dtype=torch.bool)
        index = [1] * len(shape)
        different[tuple(slice(None) if i == heads else at for i, at in enumerate(index))] = True
        assert different[oracle._place(different)].sum() == shape[heads]
        different[0] = True
        with pytest.raises(oracle.NoOracle):
            oracle._place(different)


def test_a_child_that_hangs_or_dies_is_a_row(tmp_path: Path) -> None:
    import os
    import signal
    import time

    def work(name: str) -> list[dict[str, Any]]:
        if name == "hangs":
            time.sleep(60)
        if name == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        return [{"model": name, "plan": "modulation", "outcome": "right"}]

    path = tmp_path / "rows.jsonl"
    rows = runner.run(["well", "hangs", "dies"], work, path, seconds=1, say=False)
    assert [row["outcome"] for row in rows] == ["right", "no answer", "no answer"]
    assert "1 s were not enough" in rows[1]["reason"] and "signal" in rows[2]["reason"]
    with path.open("a") as file:
        file.write('{"model": "cut o')
    assert runner.read_rows(path) == rows
    assert "no answer: hangs" in table.text(rows)


def test_the_table_counts_each_library_and_plan() -> None:
    rows = [
        {
            "model": "timm/vision_transformer",
            "plan": "modulation",
            "outcome": "right",
            "error": 1e-15,
            "oracle": "hook",
        },
        {"model": "timm/vision_transformer", "plan": "task tokens", "outcome": "right", "oracle": "no oracle: none"},
        {"model": "transformers/a", "plan": "build", "outcome": "not built", "reason": "needs a library"},
        {"model": "transformers/b", "plan": "rest", "outcome": "no answer", "reason": "60 s were not enough"},
    ]
    counts = table.totals(rows)
    assert counts["timm"]["modulation"]["right"] == 1 and counts["transformers"]["build"]["not built"] == 1
    assert counts["transformers"]["task tokens"]["no answer"] == 1
    markdown = table.markdown(rows)
    assert "| timm | 1 | modulation | 1 | 0 | 0 | 0 | 0 |" in markdown
    assert "| timm/vision_transformer | right | right (no oracle) | - | 1e-15 |" in markdown
