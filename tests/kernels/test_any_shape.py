"""Shapes, dtypes and layouts that nobody thought of, against the oracles."""

from hypothesis import given
from hypothesis import strategies as st

from dtme_kernels import count_conflicts
from dtme_kernels.testing import DTYPES, LAYOUTS, make, orthogonal
from tests.kernels.test_conflicts import check as check_counts
from tests.kernels.test_conflicts import counts_oracle
from tests.kernels.test_covariance import check as check_covariance


@given(
    num_tasks=st.integers(2, 6),
    lead=st.lists(st.integers(0, 5), max_size=3),
    p=st.integers(2, 24),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_conflicts_of_any_shape(num_tasks, lead, p, dtype, seed, data):
    rank = data.draw(st.integers(1, p - 1))
    grads, basis = make(num_tasks, *lead, p, dtype=dtype, seed=seed), orthogonal(p, seed)
    check_counts(count_conflicts(grads, basis, rank), counts_oracle(grads, basis, rank))


@given(
    lead=st.lists(st.integers(0, 5), max_size=3),
    p=st.integers(1, 40),
    layout=st.sampled_from(sorted(LAYOUTS)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_covariance_of_any_shape(lead, p, layout, dtype, seed):
    check_covariance(make(1, *lead, p, layout=layout, dtype=dtype, seed=seed), "auto")
