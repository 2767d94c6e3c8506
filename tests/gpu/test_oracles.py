"""The oracle tests of tests/kernels, on CUDA tensors: bfloat16 too, which no interpreter multiplies."""

from inspect import signature

from tests.kernels import test_attention, test_conflicts, test_covariance, test_determinism, test_modulation

for _module in (test_covariance, test_conflicts, test_modulation, test_attention):
    for _name, _test in vars(_module).items():
        if _name.startswith("test_") and "impl" in signature(_test).parameters:
            globals()[f"{_name}_of_{_module.__name__.rpartition('_')[2]}"] = _test

test_two_runs_give_the_same_bits = test_determinism.test_two_runs_give_the_same_bits
