# `make demo` and `make test` are all a newcomer needs; every target sets up .venv by itself.
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
TORCH := torch==2.13.0
WORKERS ?= 2
DEMO ?=
EXAMPLES ?= 1000
TRITON ?= 3.9.0
AOT := $(VENV)-triton-$(TRITON)

.PHONY: demo test fuzz aot bench gpu lint clean

demo: $(READY)
	$(RUN) -m benchmarks.paper demo $(DEMO)

test: $(READY)
	$(RUN) -m pytest -q -m "not gpu" -n $(WORKERS) --dist loadgroup

# what Hypothesis draws, anew every time, where CI draws the same: EXAMPLES per test, SEED=... repeats a run
fuzz: $(READY)
	DTME_HYPOTHESIS=fuzz DTME_EXAMPLES=$(EXAMPLES) $(RUN) -m pytest -q -m "hypothesis and not gpu" -n $(WORKERS) \
	    --dist worksteal $(if $(SEED),--hypothesis-seed=$(SEED)) tests

# every kernel for every chip, by the Triton that is named: make aot TRITON=3.6.0
aot: $(READY)
	python3 -m venv $(AOT)
	$(AOT)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(AOT)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH) triton==$(TRITON) \
	    numpy safetensors tqdm pytest pytest-xdist hypothesis
	DTME_AOT=exact PYTHONPATH=.:python $(AOT)/bin/python -m pytest -q -n $(WORKERS) --dist loadgroup tests/kernels/test_aot.py

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
	rm -rf $(VENV) $(VENV)-triton-* build dist out *.egg-info dtme_kernels/*.so dtme_kernels/_build.json
