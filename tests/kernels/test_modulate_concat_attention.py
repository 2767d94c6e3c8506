"""The first half of an expanded block against NumPy in float64, and against concatenation."""

import numpy as np
import pytest
import torch

from dtme_kernels import modulate_concat_attention
from dtme_kernels.testing import LOW_PRECISION, assert_accurate, exact, make


def problem(tokens=(2, 5, 8), num_streams=3, t=2, heads=2, bias=True, dtype=torch.float32, grad=False):
    """Arguments of modulate_concat_attention."""
    p = tokens[-1]
    shapes = {
        "tokens": tokens,
        "weight": (num_streams, p),
        "bias": (num_streams, p),
        "task_tokens": (num_streams, t, p),
    }
    shapes |= {"norm_weight": (p,), "norm_bias": (p,), "qkv_weight": (3 * p, p), "qkv_bias": (3 * p,)}
    args = {
        name: make(*shape, dtype=dtype, seed=s, requires_grad=grad) for s, (name, shape) in enumerate(shapes.items())
    }
    args["qkv_weight"] = (args["qkv_weight"].detach() * p**-0.5).requires_grad_(grad)
    return args | {"num_heads": heads} | ({} if bias else {"qkv_bias": None})


def oracle(tokens, weight, bias, task_tokens, norm_weight, norm_bias, qkv_weight, qkv_bias, num_heads):
    """Modulate, append, norm, qkv, attention over N + t tokens; drop the last t outputs."""
    x, w, b, task, g, c, qkv = exact(tokens, weight, bias, task_tokens, norm_weight, norm_bias, qkv_weight)
    y = w[:, None, None] * x + b[:, None, None]
    num_streams, num_images, num_tokens, p = y.shape
    whole = np.concatenate([y, np.broadcast_to(task[:, None], (num_streams, num_images, *task.shape[1:]))], 2)
    centred = whole - whole.mean(-1, keepdims=True)
    z = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * g + c
    out = z @ qkv.T + (0 if qkv_bias is None else exact(qkv_bias)[0])
    q, k, v = np.moveaxis(out.reshape(*out.shape[:-1], 3, num_heads, p // num_heads), (3, 4), (0, 3))
    scores = q @ np.swapaxes(k, -1, -2) * (p // num_heads) ** -0.5
    probabilities = np.exp(scores - scores.max(-1, keepdims=True))
    attended = (probabilities / probabilities.sum(-1, keepdims=True)) @ v
    return np.moveaxis(attended, 2, 3)[:, :, :num_tokens].reshape(y.shape), y


@pytest.mark.parametrize(
    "options",
    [{}, {"t": 0}, {"tokens": (3, 2, 5, 8)}, {"bias": False}, {"heads": 8}, {"num_streams": 1}, {"tokens": (2, 1, 6)}],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_matches_concatenation(impl, options, dtype):
    args = problem(**options, dtype=dtype)
    concatenation = modulate_concat_attention(**args, impl="reference")
    for got, want, by_torch in zip(
        modulate_concat_attention(**args, impl=impl), oracle(**args), concatenation, strict=True
    ):
        assert got.dtype == dtype
        assert_accurate(got, want, by_torch)


@pytest.mark.parametrize("options", [{}, {"t": 0}, {"tokens": (3, 2, 5, 8)}, {"bias": False}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION])
def test_gradients_are_as_right_as_concatenation(impl, options, dtype):
    args = problem(**options, dtype=dtype, grad=True)
    wide = {
        name: x.detach().double().requires_grad_() if isinstance(x, torch.Tensor) else x for name, x in args.items()
    }
    found = []
    for kind, values in ((impl, args), ("reference", wide), ("reference", args)):
        outputs = modulate_concat_attention(**values, impl=kind)
        loss = sum((x * make(*x.shape, dtype=x.dtype, seed=9)).sum() for x in outputs)
        leaves = [x for x in values.values() if isinstance(x, torch.Tensor) and x.numel()]
        found.append(torch.autograd.grad(loss, leaves))
    for got, want, concatenation in zip(*found, strict=True):
        assert_accurate(got, want.cpu(), concatenation, terms=30)  # rounded rows are summed over streams and images


@pytest.mark.float64
def test_gradients(impl):
    args = problem((2, 3, 4), 2, dtype=torch.float64, grad=True)
    names, tensors = zip(*((name, x) for name, x in args.items() if isinstance(x, torch.Tensor)), strict=True)

    def function(*tensors):
        return modulate_concat_attention(**args | dict(zip(names, tensors, strict=True)), scale=0.4, impl=impl)

    assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"tokens": make(5, 8)}, ValueError, "tokens must be"),
        (
            {"task_tokens": make(2, 8)},
            ValueError,
            r"task_tokens must be \(T, t, p\) with T = 3 and p = 8, got \(2, 8\)",
        ),
        ({"task_tokens": make(2, 2, 8)}, ValueError, r"task_tokens must be .* = \(3, 2, 8\), got \(2, 2, 8\)"),
        ({"norm_weight": make(7)}, ValueError, r"norm_weight must be \(p,\) = \(8,\)"),
        ({"norm_bias": make(8).double()}, TypeError, "norm_bias must be torch.float32 like norm_weight"),
        ({"qkv_weight": make(8, 8)}, ValueError, r"qkv_weight must be \(3p, p\) = \(24, 8\), got \(8, 8\)"),
        ({"qkv_weight": make(24, 8).half()}, TypeError, "qkv_weight must be torch.float32 like tokens"),
        ({"qkv_bias": make(8)}, ValueError, r"qkv_bias must be \(3p,\) = \(24,\), got \(8,\)"),
        ({"qkv_bias": "no"}, TypeError, "qkv_bias must be a tensor, got str"),
        ({"num_heads": 3}, ValueError, "num_heads must divide p = 8, got 3"),
        ({"num_heads": 0}, ValueError, "num_heads must divide p = 8, got 0"),
        ({"num_heads": 2.0}, TypeError, "num_heads must be an int, got 2.0"),
    ],
)
def test_bad_arguments(change, error, says):
    with pytest.raises(error, match=says):
        modulate_concat_attention(**problem() | change)
