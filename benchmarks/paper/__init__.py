"""The paper's tables in small: data, losses, metrics, commands (``python -m benchmarks.paper``)."""
