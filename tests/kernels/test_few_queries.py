"""A few queries that meet many keys, as when text is written, run in another way than many do."""

import pytest
import torch

from dtme_kernels import expanded_attention
from dtme_kernels.testing import DTYPES, assert_accurate, make
from tests.kernels.test_attention import masks, oracle, problem

CPP = [dtype for dtype in DTYPES if dtype != torch.float64]


@pytest.mark.parametrize("masked", [None, "bool", "additive", "causal"])
@pytest.mark.parametrize(("heads", "key_heads", "queries"), [(2, 2, 1), (4, 1, 1), (2, 2, 4), (4, 2, 2), (2, 2, 5)])
@pytest.mark.parametrize("dtype", CPP, ids=str)
def test_is_attention(dtype, heads, key_heads, queries, masked):
    args = problem((3, 2), heads, key_heads, queries, keys=67, t=3, d=20, dtype=dtype)
    visible, additive = masks(3, 2, 1, queries, 67, dtype=dtype)
    mask = {None: None, "bool": visible, "additive": additive, "causal": None}[masked]
    options = {"attn_mask": mask, "is_causal": masked == "causal"}
    found = expanded_attention(*args, **options, impl="cpp")
    plain = expanded_attention(*args, **options, impl="reference")
    assert_accurate(found, oracle(*args, **options), plain, 67)


def test_reads_keys_where_they_lie_and_repeats_its_bits_on_any_number_of_threads():
    query, key, value, *task = problem((1, 3), 4, 4, 1, keys=130, t=2, d=33)
    want = expanded_attention(query, key, value, *task, impl="cpp")
    strange = make(1, 3, 130, 4, 66).transpose(2, 3)[..., ::2]  # channels two apart, heads between tokens
    strange.copy_(key)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(expanded_attention(query, strange, value, *task, impl="cpp"), want)
    finally:
        torch.set_num_threads(before)


def test_hidden_and_infinite_scores():
    query, key, value, *task = problem((1, 1), 1, 1, 1, keys=9, t=0, d=8)
    nothing = torch.zeros(1, 9, dtype=torch.bool)
    assert not expanded_attention(query, key, value, *task, attn_mask=nothing, impl="cpp").any()
    key[..., 3, :] = torch.nan
    assert expanded_attention(query, key, value, *task, impl="cpp").isnan().all()
