"""``python -m benchmarks.gpu``: what is worth most on a GPU in a given number of seconds, written down as it comes."""
