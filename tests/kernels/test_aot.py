"""Every kernel in every shipped configuration, compiled for three generations of GPUs on any machine."""

import subprocess
import sys
from importlib.util import find_spec

import pytest

from dtme_kernels import aot, launch

pytestmark = pytest.mark.skipif(find_spec("triton") is None or launch.interpreted(), reason="Triton is not installed")

PRODUCTS = {80: "mma", 90: "wgmma", 100: "tcgen05"}
KERNELS = {
    *("multiply", "accumulate", "multiply_symmetric"),
    *("scale_tokens", "split_basis", "pair_dots", "count", "mix"),
    *("modulate", "modulate_backward"),
}
ATTENTION = {"attend", "query_gradients", "key_gradients", "mask_gradients"}
MULTIPLY = {"multiply", "multiply_symmetric", "pair_dots"} | ATTENTION


@pytest.mark.parametrize("capability", PRODUCTS)
def test_no_spill_within_shared_memory_on_tensor_cores(capability):
    rows = list(aot.compile_cases(capability))
    assert {row.kernel for row in rows} == KERNELS | ATTENTION
    for row in rows:
        assert row.capability == capability
        assert row.spills == 0, row
        assert row.registers <= 255, row
        assert row.shared <= aot.CHIPS[capability].shared_memory, row
        # float32 as exact as IEEE, in the gradient of the covariance, is the one product on no tensor core
        ieee = row.kernel == "multiply_symmetric" and "fp32" in row.case and "tf32" not in row.case
        product = "fma" if ieee else PRODUCTS[capability] if row.kernel in MULTIPLY else ""
        # tiles of few rows, of float32 or 256 channels, are not for the products of whole warp groups
        few_rows = row.kernel in ATTENTION and ("fp32" in row.case or "d=256" in row.case)
        assert row.instruction == product or (few_rows and row.instruction == "mma"), row


def test_info_prints_the_table():
    info = [sys.executable, "-m", "dtme_kernels.info", "--aot"]
    # the first lines: the rest is the table that the other test checks
    with subprocess.Popen([*info, "90"], stdout=subprocess.PIPE, text=True) as run:
        header, first = run.stdout.readline(), run.stdout.readline()
        run.kill()
    assert header.split() == ["kernel", "chip", "warps", "registers", "spills", "shared", "KB", "product"]
    assert first.split()[-7:-5] == ["multiply", "sm_90"]
    refused = subprocess.run([*info, "75"], capture_output=True, text=True)
    assert refused.returncode == 2
    assert "capabilities must be of [80, 90, 100], got [75]" in refused.stderr
