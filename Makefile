# `make demo` and `make test` are all a newcomer needs; every target sets up .venv by itself.
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
TORCH := torch==2.13.0
OLD_TIMM := 0.5.4 0.6.13
WORKERS ?= 2
DEMO ?=
PAPER ?=
EXAMPLES ?= 1000
CALLS ?= 100000
TRITON ?= 3.9.0
AOT := $(VENV)-triton-$(TRITON)
BUDGET ?= 300
OUT ?= out/gpu
STAGES ?=
RESUME ?=
ONLY ?=
GPU_WORKERS ?= 14
GPU_TRITON ?= 3.6.0
GPU_PYTHON ?= python3.12
THERE = out/triton-$(GPU_TRITON)-there
HERE = out/triton-$(GPU_TRITON)-here

.PHONY: demo test everything fuzz aot bench sweep stacks paper-smoke gpu gpu-test gpu-cache lint clean

demo: $(READY)
	$(RUN) -m benchmarks.paper demo $(DEMO)

test: $(READY)
	$(RUN) -m pytest -q -m "not gpu" -n $(WORKERS) --dist loadgroup --no-loadscope-reorder

# what CI has no time for, too: every kernel for every chip, all that Triton's interpreter can run, every instruction set
# under the sanitizers. Half an hour and more
everything: $(READY)
	DTME_TESTS=everything $(RUN) -m pytest -q -m "not gpu" -n $(WORKERS) --dist loadgroup --no-loadscope-reorder

# what is drawn anew every time: by Hypothesis, EXAMPLES per test; CALLS of the public functions; ten times as many of the
# raw operators with mutilated arguments. The C++ kernels run under the sanitizers. SEED=... repeats a run
fuzz: $(READY)
	DTME_HYPOTHESIS=fuzz DTME_EXAMPLES=$(EXAMPLES) $(RUN) -m pytest -q -m "hypothesis and not gpu" -n $(WORKERS) \
	    --dist worksteal $(if $(SEED),--hypothesis-seed=$(SEED)) tests
	$(RUN) -m tests.csrc.watched out/watched -- -m tests.fuzz public --calls $(CALLS) $(if $(SEED),--seed $(SEED))
	$(RUN) -m tests.csrc.watched out/watched -- -m tests.fuzz raw --calls $(CALLS)0 $(if $(SEED),--seed $(SEED))

# every kernel for every chip, by the Triton that is named: make aot TRITON=3.6.0
aot: $(READY)
	python3 -m venv $(AOT)
	$(AOT)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(AOT)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH) triton==$(TRITON) \
	    numpy safetensors tqdm pytest pytest-xdist hypothesis
	DTME_TESTS=everything PYTHONPATH=.:python $(AOT)/bin/python -m pytest -q -n $(WORKERS) --dist loadgroup tests/kernels/test_aot.py

bench: $(READY)
	$(RUN) -m benchmarks.kernels --cpu

# every transformer of timm, transformers and torchvision that can be built small, expanded and checked: ONLY picks by a
# regular expression, RESUME=1 goes on; `python -m benchmarks.models table` writes the README's table
sweep: $(READY)
	$(RUN) -m benchmarks.models --only '$(ONLY)' $(if $(RESUME),--resume)

# an expanded model in every training, serving and shipping stack that is known, against plain code: ONLY picks by a
# regular expression; `python -m benchmarks.stacks table` writes the rows in Markdown
stacks: $(READY)
	$(RUN) -m benchmarks.stacks --only '$(ONLY)'

# the evaluation in small: every data set, arm, experiment and study for a few steps, their reports, and a run that is killed
paper-smoke: $(READY)
	$(RUN) -m benchmarks.paper smoke $(PAPER)

# with the python3 that is given, which has the torch and Triton of its GPU: nothing is installed. What is worth most in
# BUDGET seconds, every figure written to OUT as it comes; STAGES picks by a regular expression, RESUME=1 goes on
gpu:
	PYTHONPATH=.:python python3 -m benchmarks.gpu --budget $(BUDGET) --out $(OUT) --stages '$(STAGES)' $(if $(RESUME),--resume)

# all of tests/gpu, the tests that want the GPU for themselves one by one behind the others
gpu-test:
	PYTHONPATH=.:python python3 -m pytest -q tests/gpu -m "not alone" -n $(GPU_WORKERS); tests=$$?; \
	PYTHONPATH=.:python python3 -m pytest -q tests/gpu -m alone && exit $$tests

# what `make gpu` will compile, compiled here without a GPU: out/gpu-cache.tar, which it unpacks where it finds it. For
# the Triton and the Python of the machine with the GPU, whose interpreter has to be here too, for its headers
gpu-cache: $(READY) $(THERE)/.ready $(HERE)/.ready
	DTME_TRITON_THERE=$(THERE)/bin/python PYTHONPATH=$(HERE):.:python \
	$(RUN) -m benchmarks.gpu --record --stages '$(STAGES)'

$(THERE)/.ready:
	$(GPU_PYTHON) -m venv $(THERE)
	$(THERE)/bin/python -m pip install --quiet --disable-pip-version-check triton==$(GPU_TRITON)
	touch $@

$(HERE)/.ready: | $(READY)
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --target $(HERE) triton==$(GPU_TRITON)
	touch $@

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# torch is named on every line that could replace it by a CUDA build, and comes first: the C++ kernels are built against it
$(READY): pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*)
	python3 -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(RUN) -m pip install --quiet --disable-pip-version-check $(TORCH) -e ".[dev]"
	for release in $(OLD_TIMM); do \
	    $(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)/timm-$$release timm==$$release || exit; \
	done
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-triton-* build dist out *.egg-info dtme_kernels/*.so dtme_kernels/_build.json
