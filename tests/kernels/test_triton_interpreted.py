"""The Triton kernels without a GPU: Triton's interpreter runs them in NumPy, against the oracles of the reference.

The interpreter has to be switched on before Triton is imported, so this file runs itself in a process of its own. It
knows no races, and multiplies the raw bits of bfloat16 in ``tl.dot``; tests/gpu has those. It takes seconds for what a
GPU does at once: ``SPARED`` is what CI leaves to ``make everything``.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dtme_kernels import launch
from tests.extent import EVERYTHING
from tests.kernels import (
    every_implementation,
    test_attention,
    test_conflict_rotation,
    test_conflicts,
    test_covariance,
    test_modulate_concat_attention,
    test_modulation,
)

# what runs beside each other in CI: {name: test modules}
PARTS = {
    "conflicts": (test_conflicts,),
    "attention": (test_attention, test_modulate_concat_attention),
    "others": (test_covariance, test_modulation),
}


def narrow(parameters):
    return parameters["dtype"] != torch.float32


# {test: of which parameters}; float16 differs from float32 in what is read and written, not in what is computed
SPARED = {
    (test_attention, "test_gradients_are_as_right_as_plain_torch"): lambda p: (
        p["kind"] in ("none", "bool", "padding") or narrow(p) or (p["kind"] == "additive" and p["sizes"]["d"] == 64)
    ),
    (test_attention, "test_gradient_of_an_additive_mask"): narrow,
    (test_attention, "test_layouts_that_can_and_cannot_be_read_by_eight_channels"): lambda p: (
        p["layout"] in ("transposed", "expanded")
    ),
    (test_conflicts, "test_counts_match_oracle"): lambda p: narrow(p) and p["shape"][0] > 4,
    (test_conflicts, "test_dots_match_oracle"): lambda p: narrow(p) and p["shape"][0] > 4,
    (test_conflicts, "test_a_weak_null_space_keeps_its_signs"): lambda p: True,
    (test_conflicts, "test_a_basis_that_is_singular_where_nobody_looks"): lambda p: True,
    (test_modulation, "test_gradients_are_as_right_as_plain_torch"): lambda p: (
        narrow(p) and (p["layout"] == "transposed" or len(p["shape"]) == 4)
    ),
}

if not launch.interpreted():

    @pytest.mark.parametrize(
        "part", [pytest.param(part, marks=pytest.mark.xdist_group(f"interpreted {part}")) for part in PARTS]
    )
    def test_kernels_in_the_interpreter(part):
        pytest.importorskip("triton")
        environment = {k: v for k, v in os.environ.items() if "XDIST" not in k}
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
            env=environment | {"TRITON_INTERPRET": "1", "DTME_INTERPRET": part},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stdout
        print(run.stdout.splitlines()[-1])

else:

    @pytest.fixture
    def impl(request):
        parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
        dtype = parameters.get("dtype")
        if dtype == torch.float64 or request.node.get_closest_marker("float64"):
            pytest.skip("float64 is the reference's")
        products = {x.__name__ for x in (test_covariance, test_attention, test_modulate_concat_attention)}
        if dtype == torch.bfloat16 and request.function.__module__ in products:
            pytest.skip("the interpreter cannot multiply bfloat16")
        if dtype == torch.bfloat16 and request.function is test_conflicts.test_magnitude_does_not_matter:
            pytest.skip("the interpreter misreads subnormal bfloat16")
        spared = SPARED.get((sys.modules[request.function.__module__], request.function.__name__))
        if spared is not None and not EVERYTHING and spared(parameters):
            pytest.skip("CI has not the time: make everything")
        return "triton"

    own = os.environ.get("DTME_INTERPRET")
    globals().update(every_implementation.collect(PARTS[own] if own else every_implementation.MODULES))
    if own in (None, "conflicts"):
        globals().update({name: value for name, value in vars(test_conflict_rotation).items() if "__" not in name})
