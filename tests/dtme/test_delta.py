"""Δm and its terms, and what it refuses."""

import math

import pytest

from dtme.comparison.delta import delta_m


def test_delta_m():
    total, terms = delta_m({"semseg": 44.0, "depth": 0.55}, {"semseg": 40.0, "depth": 0.5}, {"depth"})
    assert terms == {"semseg": pytest.approx(10), "depth": pytest.approx(-10)}
    assert total == pytest.approx(0)


@pytest.mark.parametrize(
    ("results", "baseline", "says"),
    [
        ({"a": 1.0}, {"b": 1.0}, "same tasks"),
        ({}, {}, "same tasks"),
        ({"a": 1.0}, {"a": 0.0}, "baseline must be above zero.*'a'"),
        ({"a": 1.0, "b": 1.0}, {"a": 1.0, "b": -1.0}, "baseline must be above zero.*'b'"),
        ({"a": math.nan, "b": 1.0}, {"a": 1.0, "b": 1.0}, "results must be finite.*'a'"),
        ({"a": 1.0, "b": 1.0}, {"a": 1.0, "b": math.inf}, "baseline must be finite.*'b'"),
    ],
)
def test_delta_m_names_the_culprit(results, baseline, says):
    with pytest.raises(ValueError, match=says):
        delta_m(results, baseline, {"a"})
