"""Quantised weights, by torchao and bitsandbytes."""
