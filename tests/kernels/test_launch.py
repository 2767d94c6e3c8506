"""Decisions before a launch, on tensors without storage: copies, limits, reasons."""

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from dtme_kernels import count_conflicts, projected_dots, token_covariance, token_covariance_
from dtme_kernels.conflicts import op
from dtme_kernels.launch import collapse, in_reach, interpreted
from dtme_kernels.testing import make, orthogonal

triton_only = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


@pytest.mark.parametrize(
    ("tokens", "shape"),
    [
        (make(4, 5, 6, 8), (1, 120, 8)),
        (make(4, 5, 6, 8)[:, 1:], (4, 24, 8)),
        (make(4, 5, 8).transpose(0, 1), (5, 4, 8)),
        (make(4, 1, 8).expand(4, 5, 8), (4, 5, 8)),
        (make(8), (1, 1, 8)),
        (make(1, 1, 8), (1, 1, 8)),
        (make(0, 3, 8), None),
    ],
)
def test_tokens_are_seen_without_a_copy(tokens, shape):
    seen = collapse(tokens)
    assert shape is None or seen.shape == shape
    assert torch.equal(seen.reshape(-1, 8), tokens.reshape(-1, 8))
    assert not tokens.numel() or seen.data_ptr() == tokens.data_ptr()


def test_tasks_stay_apart():
    grads = make(3, 4, 5, 8)[:, :, 1:]
    assert collapse(grads, keep=1).shape == (3, 4, 4, 8)
    assert torch.equal(collapse(grads, keep=1).reshape(grads.shape), grads)


def test_what_two_strides_cannot_address_is_copied():
    tokens = make(4, 5, 6, 7, 8)[:, 1:, ::2]
    assert collapse(tokens).is_contiguous()
    assert torch.equal(collapse(tokens).reshape(tokens.shape), tokens)


def test_past_two_to_the_31():
    """Token offsets are 64 bits wide; channels of a token that lie further apart are copied together."""
    far = torch.empty(1, device="meta").as_strided((3, 768), (1, 2**22))
    assert collapse(far).stride(-1) == 1
    assert collapse(torch.empty(1, device="meta").as_strided((3, 1), (1, 2**40))).shape == (1, 3, 1)
    assert in_reach(far).stride() == (768, 1)
    wide = torch.empty(2**22, 768, dtype=torch.bfloat16, device="meta")
    assert collapse(wide).shape == (1, 2**22, 768)
    assert collapse(wide).stride() == (0, 768, 1)
    grads = torch.empty(2, 2**31, 2, device="meta")
    assert "tokens at a time" in op._triton_cannot_run(grads)


@triton_only
@pytest.mark.skipif(interpreted(), reason="the interpreter takes CPU tensors")
def test_kernels_refuse_what_they_cannot_run_and_auto_does_not():
    basis = orthogonal(8)
    for grads, why in (
        (make(3, 9, 8), r"Triton kernels run on CUDA tensors \(on the CPU with TRITON_INTERPRET=1\), got cpu tensors"),
        (make(3, 9, 8, dtype=torch.float64), ".*float64 is the reference's"),
        (make(17, 9, 8), "the kernels take 16 tasks at most, got 17"),
    ):
        for function in (count_conflicts, projected_dots):
            function(grads, basis, 3)
            with pytest.raises(RuntimeError, match=rf"cannot run {function.__name__}: {why}"):
                function(grads, basis, 3, impl="triton")
    with pytest.raises(RuntimeError, match=r"cannot run token_covariance: .*got cpu tensors"):
        token_covariance(make(3, 8), impl="triton")
    accumulator = torch.zeros(8, 8)
    with pytest.raises(RuntimeError, match=r"cannot run token_covariance_: .*got cpu tensors"):
        token_covariance_(accumulator, make(3, 8), impl="triton")
    assert not accumulator.any()


def test_without_triton_the_reference_is_all_there_is():
    script = (
        "import importlib.util as u; real = u.find_spec;"
        "u.find_spec = lambda name, *a: None if name == 'triton' else real(name, *a);"
        "import dtme_kernels as dk; from dtme_kernels.registry import OPERATORS;"
        "assert OPERATORS['count_conflicts'].automatic('cuda') == 'reference';"
        "assert 'Triton is not installed' in OPERATORS['token_covariance'].missing('triton')"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
