"""The running second moment: exact over many small batches, and unharmed by bad ones."""

import copy
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from dtme_kernels import StreamingCovariance
from dtme_kernels.testing import assert_accurate, exact, make

P = 6


def batches(count=5, layers=None):
    shapes = [(3, 4, P)] if layers is None else [(3, 4 + d, P) for d in range(layers)]
    return [[make(*shape, seed=10 * i + d) for d, shape in enumerate(shapes)] for i in range(count)]


def oracle(tokens):
    """Eq. 1 of a list of (B, N, p)."""
    stacked = np.concatenate(exact(*tokens))
    return np.einsum("bnc,bnd->cd", stacked, stacked) / len(stacked)


def test_one_layer():
    moment = StreamingCovariance(P)
    for (tokens,) in batches():
        moment.update(tokens)
    want = oracle([x for (x,) in batches()])
    assert (moment.num_samples, moment.num_tokens) == (15, 60)
    assert moment.compute().dtype == torch.float64
    assert torch.equal(moment.compute(), moment.compute().T)
    np.testing.assert_allclose(moment.compute(), want, rtol=0, atol=5 * 2**-24 * np.abs(want).max())


def test_layers_of_different_lengths():
    moment = StreamingCovariance(P, 3, dtype=torch.float32)
    for tokens in batches(layers=3):
        moment.update(tokens)
    for d, got in enumerate(moment.compute()):
        want = oracle([tokens[d] for tokens in batches(layers=3)])
        assert_accurate(got, want, torch.as_tensor(want), terms=15 * (4 + d))
    assert (moment.num_samples, moment.num_tokens) == (15, 60)


def test_thousands_of_small_updates_are_not_lost():
    moment = StreamingCovariance(1)
    moment.update(torch.full((1, 1, 1), 4096.0))
    for _ in range(2000):
        moment.update(torch.full((1, 1, 1), 0.5, dtype=torch.bfloat16))
    assert moment.accumulator.item() == 4096**2 + 2000 / 4  # float32 would still hold 4096**2


def test_merge_equals_seeing_everything():
    whole, *parts = (StreamingCovariance(P, 2) for _ in range(3))
    for i, tokens in enumerate(batches(layers=2)):
        whole.update(tokens)
        parts[i % 2].update(tokens)
    merged = parts[0].merge_(parts[1])
    assert merged is parts[0]
    torch.testing.assert_close(merged.compute(), whole.compute(), rtol=1e-14, atol=0)
    assert (merged.num_samples, merged.num_tokens) == (whole.num_samples, whole.num_tokens)


def test_reset_copy_pickle_and_state():
    moment = StreamingCovariance(P, 2)
    moment.update(batches(layers=2)[0])
    restored = StreamingCovariance(P, 2)
    state = moment.state_dict()
    restored.load_state_dict(state)
    copies = [copy.deepcopy(moment), pickle.loads(pickle.dumps(moment)), restored]
    want, counts = moment.compute(), (moment.num_samples, moment.num_tokens)
    moment.update(batches(layers=2)[1])
    moment.reset()
    assert not moment.accumulator.any()
    assert (moment.num_samples, moment.num_tokens) == (0, 0)
    for other in copies:
        assert torch.equal(other.compute(), want)
        assert (other.num_samples, other.num_tokens) == counts
    assert torch.equal(state["accumulator"] / 3, want)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_tokens_are_named_at_compute(bad):
    moment, single = StreamingCovariance(P, 3), StreamingCovariance(P)
    tokens = batches(layers=3)[0]
    tokens[1][0, 2, 3] = bad
    moment.update(tokens)
    single.update(tokens[1])
    with pytest.raises(ValueError, match=r"layers \[1\] hold NaN or Inf"):
        moment.compute()
    with pytest.raises(ValueError, match="tokens hold NaN or Inf"):
        single.compute()


def test_compute_needs_a_sample():
    moment = StreamingCovariance(P)
    moment.update(torch.zeros(0, 4, P))
    with pytest.raises(ValueError, match="at least one update"):
        moment.compute()


@pytest.mark.parametrize(
    ("layers", "tokens", "error", "says"),
    [
        (None, make(4, P), ValueError, r"tokens must be \(B, N, p\), got \(4, 6\)"),
        (None, [make(3, 4, P)], TypeError, "tokens must be a tensor, got list"),
        (None, make(3, 4, P + 1), ValueError, "p = 6"),
        (2, make(3, 4, P), TypeError, "sequence of D = 2"),
        (2, [make(3, 4, P)], ValueError, "D = 2 tensors like accumulator, got 1"),
        (2, [make(3, 4, P), make(2, 4, P)], ValueError, r"tokens must have the same B in every layer, got \[3, 2\]"),
        (2, [make(3, 4, P), make(4, P)], ValueError, r"tokens\[1\] must be \(B, N, p\)"),
        (2, [make(3, 4, P), make(3, 4, P).long()], TypeError, r"tokens\[1\] must be float16"),
    ],
)
def test_a_bad_update_adds_nothing(layers, tokens, error, says):
    moment = StreamingCovariance(P, layers)
    with pytest.raises(error, match=says):
        moment.update(tokens)
    assert not moment.accumulator.any()
    assert (moment.num_samples, moment.num_tokens) == (0, 0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"accumulator": torch.ones(2, 2)}, r"state\['accumulator'\] must be \(6, 6\), got \(2, 2\)"),
        ({"accumulator": None}, "accumulator"),
        ({"num_samples": -1}, "integers >= 0"),
        ({"num_tokens": 1.5}, "integers >= 0"),
        ({"surplus": 1}, "surplus"),
    ],
)
def test_a_bad_state_loads_nothing(change, says):
    moment = StreamingCovariance(P)
    state = StreamingCovariance(P).state_dict() | {"accumulator": torch.ones(P, P), "num_samples": 3} | change
    with pytest.raises(ValueError, match=says):
        moment.load_state_dict(state)
    assert not moment.accumulator.any()
    assert moment.num_samples == 0


def test_bad_construction_and_merge():
    with pytest.raises(TypeError, match="dtype must be float32 or float64"):
        StreamingCovariance(P, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="num_features must be at least 1, got 0"):
        StreamingCovariance(0)
    with pytest.raises(ValueError, match="num_layers must be at least 1, got 0"):
        StreamingCovariance(P, 0)
    with pytest.raises(ValueError, match=r"other must accumulate \(6, 6\), got \(2, 6, 6\)"):
        StreamingCovariance(P).merge_(StreamingCovariance(P, 2))
    with pytest.raises(TypeError, match="other must be a StreamingCovariance, got dict"):
        StreamingCovariance(P).merge_({})
    with pytest.raises(RuntimeError, match="init_process_group"):
        StreamingCovariance(P).all_reduce_()


WORKER = """
import sys, torch, dtme_kernels
rank, path = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
moment = dtme_kernels.StreamingCovariance(2, 3)
moment.update([torch.full((1 + rank, 4, 2), 1.0 + rank)] * 3)
moment.all_reduce_()
assert (moment.num_samples, moment.num_tokens) == (3, 12), (moment.num_samples, moment.num_tokens)
assert torch.equal(moment.accumulator, torch.full((3, 2, 2), 4 * 1.0 + 8 * 4.0)), moment.accumulator
torch.distributed.destroy_process_group()
"""


def test_all_reduce_over_two_processes(tmp_path):
    command = [sys.executable, "-c", WORKER]
    workers = [subprocess.Popen([*command, str(rank), str(tmp_path / "rendezvous")]) for rank in range(2)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
