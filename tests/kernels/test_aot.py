"""Every kernel in every shipped configuration, compiled for six generations of GPUs on any machine.

CI has not the time for all: sm_90 gets the cases of ``WIDE``, sm_120 those of ``FEW``, each other family those of
``CORE``, and sm_80 what is compiled for sm_86 where their tiles are the same. ``make aot`` compiles everything for
every chip, also under another Triton.
"""

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from dtme_kernels import aot, launch
from dtme_kernels.aot import sass
from tests.extent import EVERYTHING

pytestmark = pytest.mark.skipif(find_spec("triton") is None or launch.interpreted(), reason="Triton is not installed")

SHARES = 2  # of a chip's kernels, one for each of two workers
SIBLINGS = aot.SIBLINGS if EVERYTHING else aot.NEARLY_SIBLINGS
# by what they start with: every kernel, in the configurations that take most registers and shared memory
CORE = (
    *("covariance p=768 fp32", "covariance backward p=768 bf16", "covariance of 12 layers p=768 bf16"),
    *("conflicts K=5 bf16, basis fp32", "conflicts K=8 fp32", "dots backward K=5"),
    *("norm T=5 p=768 bf16", "norm backward T=5 p=768 bf16", "norm backward T=5 p=768 fp32", "modulate T=5 p=768 bf16"),
    *("attention d=64 bf16", "attention backward d=64 bf16", "attention backward d=64 fp32"),
    *("attention backward d=72 bf16", "attention backward d=32 fp32"),
)
WIDE = (
    *CORE,
    *("conflicts K=2", "conflicts K=3", "ones", "attention d=64 bf16, mask", "attention backward d=64 bf16, mask"),
    *("attention d=128 bf16", "attention backward d=128 bf16", "attention d=256", "attention backward d=256"),
)
FEW = ("covariance p=768 fp32", "conflicts K=5 bf16, basis fp32", "attention backward d=64 bf16", "norm T=5 p=768 bf16")
KERNELS = {
    *("multiply", "accumulate", "multiply_symmetric"),
    *("prepare_gradients", "split_basis", "pair_dots", "count", "settle", "mix"),
    *("modulate", "modulate_backward"),
}
ATTENTION = {"attend", "query_gradients", "key_gradients", "mask_gradients"}
MULTIPLY = {"multiply", "multiply_symmetric", "pair_dots", "settle"} | ATTENTION


def shares(chips):
    """Every share of every chip, the same share always by the same worker."""
    return [
        pytest.param(chip, i, marks=pytest.mark.xdist_group(f"aot {i}"), id=f"sm_{chip.capability}-{i}")
        for i in range(SHARES)
        for chip in chips
    ]


# sm_86 first: what others are assembled from is then in Triton's cache
@pytest.mark.parametrize(("chip", "share"), shares(sorted(launch.CHIPS, key=lambda chip: chip.capability != 86)))
def test_no_spill_no_trap_within_shared_memory_on_tensor_cores(chip, share):
    only = "" if EVERYTHING else {90: WIDE, 120: FEW}.get(chip.capability, CORE)
    rows = list(aot.compile_cases(chip.capability, only, share=(share, SHARES), siblings=SIBLINGS))
    assert len(rows) >= len(only) / SHARES
    assert {row.kernel for row in rows} <= KERNELS | ATTENTION
    for row in rows:
        assert row.capability == chip.capability
        assert (row.spills, row.trap) == (0, False), row[:-1]
        assert row.registers <= 255, row[:-1]
        assert row.shared <= chip.shared_memory, row[:-1]
        # float32 as exact as IEEE, in the gradient of the covariance, is the one product on no tensor core
        ieee = row.kernel == "multiply_symmetric" and "fp32" in row.case and "tf32" not in row.case
        product = "fma" if ieee else chip.product if row.kernel in MULTIPLY else ""
        # tiles of few rows, of float32 or 256 channels, are not for the products of whole warp groups
        few_rows = row.kernel in ATTENTION and ("fp32" in row.case or "d=256" in row.case)
        assert row.product == product or (few_rows and row.product == "mma"), row[:-1]


def test_every_kernel_has_a_case(monkeypatch):
    """By name: the launchers are run, and nothing is compiled."""
    from triton.runtime.jit import JITFunction

    launched = set()
    monkeypatch.setattr(JITFunction, "run", lambda self, *_, **options: launched.add(self.fn.__name__.lstrip("_")))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")  # where every case is a kernel's
        for launch_case in aot.cases().values():
            launch_case()
    finally:
        torch.set_float32_matmul_precision(before)
    assert launched == KERNELS | ATTENTION


def test_one_kernel_of_conflicts_for_every_batch_and_rank():
    from dtme_kernels.conflicts import kernel

    basis, hashes = torch.empty(192, 192, device="meta"), {}
    for tokens, rank in ((6144, 64), (197, 1), (1, 100), (33, 191)):
        grads = torch.empty(2, tokens, 192, dtype=torch.bfloat16, device="meta")
        with aot._compiling(90, 90, "highest") as compiled:
            kernel.count_conflicts(grads, basis, [rank])
        for one in compiled:
            hashes.setdefault(one.src.name, set()).add(one.hash)
    assert {name: len(found) for name, found in hashes.items()} == dict.fromkeys(hashes, 1)
    assert len(hashes) == 5


def test_machine_code_is_read():
    (row,) = (row for row in aot.compile_cases(90, "ones: conflicts") if row.kernel == "pair_dots")
    code = sass.read(row.cubin)
    assert code.products > 0 and code.barriers > 0 and code.spills == 0
    assert code.products < code.step < code.instructions


def test_info_prints_the_table():
    info = [sys.executable, "-m", "dtme_kernels.info", "--aot"]
    table = subprocess.run([*info, "90", "--only", "ones: conflicts"], capture_output=True, text=True, check=True)
    header, *lines = table.stdout.splitlines()
    columns = ["kernel", "chip", "warps", "registers", "spills", "shared", "KB", "instructions", "barriers", "step"]
    assert header.split() == [*columns, "products", "product"]
    (line,) = (line for line in lines if " pair_dots " in line)
    assert line.split()[2:5] == ["pair_dots", "sm_90", "4"]
    assert line.split()[-1] == "wgmma"
    refused = subprocess.run([*info, "75"], capture_output=True, text=True)
    assert refused.returncode == 2
    assert "capabilities must be of [80, 86, 89, 90, 100, 120], got [75]" in refused.stderr
