"""Every transformer that can be built small, expanded and checked: ``python -m benchmarks.models``."""
