"""The oracle tests of tests/kernels, on CUDA tensors: bfloat16 too, which no interpreter multiplies."""

from tests.kernels import every_implementation, test_determinism

globals().update(every_implementation.collect())
test_two_runs_give_the_same_bits = test_determinism.test_two_runs_give_the_same_bits
