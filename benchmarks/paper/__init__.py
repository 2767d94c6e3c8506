"""The paper's tables in small: data, losses, metrics and the commands that fill them (``python -m benchmarks.paper``)."""
