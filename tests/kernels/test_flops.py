"""FLOPs of the attention operators, against what torch counts for the same attention with concatenated keys."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import dtme_kernels

T, B, H, N, D, NUM_TASK = 2, 3, 4, 5, 8, 3


def count(run):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("key_heads", [H, 2])
def test_forward_and_backward_cost_what_torchs_attention_over_all_keys_costs(key_heads):
    def tensors():
        query = torch.randn(T, B, H, N, D, requires_grad=True)
        key, value = (torch.randn(T, B, key_heads, N, D, requires_grad=True) for _ in range(2))
        return query, key, value, *(torch.randn(T, key_heads, NUM_TASK, D, requires_grad=True) for _ in range(2))

    product = 2 * T * B * H * N * (N + NUM_TASK) * D
    inputs = tensors()
    assert count(lambda: dtme_kernels.expanded_attention(*inputs)) == 2 * product
    assert count(lambda: dtme_kernels.expanded_attention(*inputs).sum().backward()) == 7 * product

    def plain():
        query, key, value = (x.flatten(0, 1).detach() for x in inputs[:3])
        key, value = (torch.cat([x, x[:, :, :NUM_TASK]], 2) for x in (key, value))
        with sdpa_kernel(SDPBackend.MATH):
            F.scaled_dot_product_attention(query, key, value, enable_gqa=key_heads != H)

    assert count(plain) == 2 * product


def test_the_first_half_of_a_block_counts_its_projections_too():
    p = H * D
    tokens, weight, bias = torch.randn(B, N, p, requires_grad=True), torch.randn(T, p), torch.randn(T, p)
    norm = {"norm_weight": torch.ones(p), "norm_bias": torch.zeros(p)}
    qkv = {"qkv_weight": torch.randn(3 * p, p), "qkv_bias": None, "num_heads": H}
    task_tokens = torch.randn(T, NUM_TASK, p)

    def run():
        return dtme_kernels.modulate_concat_attention(tokens, weight, bias, task_tokens, **norm, **qkv)[0]

    product, projections = 2 * T * B * N * (N + NUM_TASK) * p, 2 * T * (B * N * 3 + NUM_TASK * 2) * p * p
    assert count(run) == 2 * product + projections
    assert count(lambda: run().sum().backward()) == 7 * product + projections + 2 * T * B * N * 3 * p * p


@pytest.mark.parametrize("first", ["torch.utils.flop_counter", "dtme_kernels"])
def test_whichever_is_imported_first_and_triton_is_not_for_it(first):
    second = {"dtme_kernels": "torch.utils.flop_counter"}.get(first, "dtme_kernels")
    code = (
        f"import sys, {first}; early = 'triton' in sys.modules; import {second}, torch; "
        "from torch.utils.flop_counter import flop_registry; "
        "assert torch.ops.dtme.packed_attention in flop_registry; "
        "assert not any('AfterImport' in type(x).__name__ for x in sys.meta_path); "
        "assert not early or sys.argv[1] != 'dtme_kernels'"
    )
    subprocess.run([sys.executable, "-c", code, first], check=True)
