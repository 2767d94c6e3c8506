"""What the analysis claims, tried on small trained models: ``python -m benchmarks.evidence``."""
