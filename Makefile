# make demo, make test: everything they need, they install themselves, given a Python of 3.11 or newer.
# PYTHON=... chooses the interpreter, VENV=... the folder of the environment. An interpreter counts if it runs.

runs = $(1) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do if $(call runs,$$p); then echo $$p; break; fi; done)
VENV ?= .venv
BIN := $(VENV)/bin
# Beside the environment: wherever it is installed, jax looks for a TPU.
TPU_COMPILER := $(VENV)/tpu-compiler
# Folders may have spaces in their names: quoted in commands, in targets escaped.
space := $(subst ,, )
escaped = $(subst $(space),\ ,$(1))
READY := $(call escaped,$(VENV)/ready)
TPU_READY := $(call escaped,$(TPU_COMPILER)/ready)
# The other pair of jax and flax: 3.12 or newer beside 3.11, and the other way round.
OTHER ?= $(shell if "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info >= (3, 12))'; then others='python3.12 python3.13'; \
  else others=python3.11; fi; \
  for p in $$others $(wildcard $(HOME)/.pyenv/versions/3.1[23]*/bin/python); do if $(call runs,$$p); then \
  $$p -c 'import sys; sys.exit((sys.version_info >= (3, 12)) == ("3.11" in "'"$$others"'"))' && { echo $$p; break; }; fi; done)
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
export JAX_PLATFORMS ?= cpu
# Absolute, for processes that tests start elsewhere.
PYTEST = PYTHONPATH="$$(cd "$(VENV)" && pwd)/tpu-compiler$${PYTHONPATH:+:$$PYTHONPATH}" "$(BIN)/python" -m pytest -n 2 \
  --dist loadscope --no-loadscope-reorder -q --durations=20 --durations-min=5
# Most of a test is compilation, and with few optimisations that takes less than half as long. What the others do to the
# numbers is seen by test-all and test-other.
QUICK := JAX_DISABLE_MOST_OPTIMIZATIONS=1

.PHONY: demo test test-fast test-tpu test-all test-other lint format clean

demo: $(READY)
	"$(BIN)/python" -m experiments.reproduce --table=state_tracking --scale=demo
	@echo; echo 'To try next:'
	@echo '  $(BIN)/python -m experiments.train --config=experiments/configs/delta_net.py:mqar,smoke --workdir=runs/mqar'
	@echo '  $(BIN)/python -m experiments.html_report --table=state_tracking --scale=demo --out=runs/demo.html'
	@echo '  $(BIN)/python -m experiments.reproduce --table=icl_regression --scale=cpu'

test: $(TPU_READY)
	$(QUICK) $(PYTEST) -m "not full and not cluster and not browser"

test-fast: $(READY)
	$(QUICK) $(PYTEST) -m "not full and not slow and not cluster and not browser"

# Every TPU kernel at every recorded size, for every generation; `make test` has some of each op.
test-tpu: $(TPU_READY)
	$(PYTEST) tests/experiments/benchmarks/tpu_aot_test.py

test-all: $(TPU_READY)
	$(PYTEST) -m "not cluster and not browser"

# The fast tier on the other supported pair of versions, where such an interpreter works.
test-other:
	@if [ -n "$(OTHER)" ]; then $(MAKE) test-fast QUICK= PYTHON="$(OTHER)" VENV=.venv-other; \
	else echo "no second interpreter that runs: the other pair of jax and flax is not tested"; fi

lint: $(READY)
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .
	"$(BIN)/pyright" --pythonpath "$(BIN)/python"
	"$(BIN)/pyright" --pythonpath "$(BIN)/python" --project tests

format: $(READY)
	"$(BIN)/ruff" check --fix .
	"$(BIN)/ruff" format .

$(READY): pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then echo "scanax needs Python 3.11 or newer; give one as PYTHON=..." >&2; exit 1; fi
	"$(PYTHON)" -m venv "$(VENV)"
	"$(BIN)/python" -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch "$@"

# For the tests that compile kernels, which are skipped where no such compiler can be installed.
$(TPU_READY): $(READY)
	"$(BIN)/python" -c 'import tomllib; \
	  print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["aot"], sep="\n")' > "$(VENV)/aot.txt"
	"$(BIN)/python" -m pip install --quiet --no-deps --target "$(TPU_COMPILER)" --requirement "$(VENV)/aot.txt" && touch "$@" \
	  || echo "libtpu could not be installed: the tests that compile for a TPU are skipped"

clean:
	rm -rf .venv .venv-other .cache build dist
