# `make demo` and `make test` are all a newcomer needs; every target sets up .venv by itself.
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
TORCH := torch==2.13.0
WORKERS ?= 2
DEMO ?=

.PHONY: demo test bench gpu lint clean

demo: $(READY)
	$(RUN) -m benchmarks.paper demo $(DEMO)

test: $(READY)
	$(RUN) -m pytest -q -m "not gpu" -n $(WORKERS) --dist loadfile

bench: $(READY)
	$(RUN) -m benchmarks.kernels --cpu

# with the python3 that is given, which has the torch and Triton of its GPU: nothing is installed
gpu:
	PYTHONPATH=.:python python3 -m pytest -q tests/gpu; tests=$$?; \
	PYTHONPATH=.:python python3 -m benchmarks.kernels && exit $$tests

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# torch is named on every line that could replace it by a CUDA build, and comes first: the C++ kernels are built against it
$(READY): pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*)
	python3 -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(RUN) -m pip install --quiet --disable-pip-version-check $(TORCH) -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist out *.egg-info dtme_kernels/*.so dtme_kernels/_build.json
