# make demo and make test set themselves up in $(VENV); choose another interpreter by PYTHON=python3.12
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST := $(BIN)/python -m pytest -n auto --dist worksteal
# too long for the six minutes of make test: test-recipes runs them
LATER := tests/unit/test_kernels.py::test_values_in_the_interpreter \
	tests/unit/test_loss.py::test_compiled_as_on_a_gpu \
	tests/commands/test_distributed.py::test_resume_after_a_worker_was_killed \
	tests/commands/test_distributed.py::test_a_given_profile_is_the_first_workers \
	tests/commands/test_extending.py::test_what_knows_the_folder_and_what_does_not \
	tests/commands/test_extending.py::test_both_appear_in_the_comparison
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# with a GPU; the pinned torch is for CPUs, so say which Python has one: make gpu-report PYTHON=...
OUT ?= gpu-report

.PHONY: help demo lint test test-recipes test-robustness kills fuzz test-all test-slow coverage mutants gpu-report clean

help:
	@echo "make demo       train an 18-18 Transformer as Post-LN, Pre-LN and Admin, compare and draw (about 10 minutes)"
	@echo "make test       lint, tests of the modules and of the commands (at most 6 minutes on two cores)"
	@echo "make test-all   these, and then those of examples/ and benchmarks/ and attacks (at most 20 minutes)"
	@echo "make kills      50 kills a command and a step of a recipe, instead of the 2 of test-all"
	@echo "make fuzz       10,000 damaged checkpoints and profiles against every command"
	@echo "make test-slow  tests that take minutes each: 72 layers at full width"
	@echo "make coverage   branches of the core that tests reach (first: $(BIN)/pip install coverage)"
	@echo "make mutants    which changed lines no test notices: FILES=\"norm checkpoints/files\" (first: $(BIN)/pip install coverage mutmut)"
	@echo "make gpu-report PYTHON=python  all that only a GPU shows, in nine minutes, with a Python that has torch for it"
	@echo "make clean      remove the environment and the demo's output"

demo: $(READY)
	$(BIN)/python examples/demo/demo.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/shellcheck examples/*/*.sh benchmarks/*.sh
	$(BIN)/mypy
	$(BIN)/pylint admin_fairseq benchmarks examples tests  # repeated lines

test: lint
	$(PYTEST) tests/unit tests/commands $(LATER:%=--deselect %)

test-recipes: $(READY)
	$(PYTEST) tests/recipes $(LATER)

test-robustness: $(READY)
	$(PYTEST) tests/robustness

kills: $(READY)
	KILLS=50 $(PYTEST) tests/robustness/test_kills.py

fuzz: $(READY)
	FUZZ=910 $(PYTEST) tests/robustness/test_fuzz.py

test-all: test
	$(MAKE) test-recipes
	$(MAKE) test-robustness

test-slow: $(READY)
	$(PYTEST) -m slow

coverage: $(READY)
	$(BIN)/python -m coverage run -m pytest tests/unit tests/commands $(LATER:%=--deselect %)
	$(BIN)/python -m coverage combine -q
	$(BIN)/python -m coverage report

mutants: $(READY)
	$(BIN)/python tests/mutants.py $(FILES)

gpu-report:
	PYTHON=$(PYTHON) benchmarks/gpu.sh $(OUT)

# what requirements.txt asks for, to the last package and with hashes: .ci/lock writes it
LOCKED := $(PIP) --no-deps --no-build-isolation --require-hashes -r

$(READY): $(wildcard requirements*.lock) requirements-fairseq.txt setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' || \
		{ echo "The pinned environment needs Python 3.11 or 3.12; say which, for example: make demo PYTHON=python3.12"; exit 1; }
	@echo "Setting up in $(VENV), once."
	@echo "1/4  virtual environment, $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@echo "2/4  torch and other packages of requirements.lock"
	@$(LOCKED) requirements-build.lock
	@$(LOCKED) requirements.lock
	@$(LOCKED) requirements-cpu.lock 2>/dev/null || $(LOCKED) requirements-cuda.lock
	@echo "3/4  fairseq (on Python 3.11 it is compiled here: about two minutes of silence)"
	@CFLAGS="-O0 -g0" $(LOCKED) requirements-fairseq.txt
	@echo "4/4  admin_fairseq itself"
	@$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@
	@echo "Ready."

clean:
	rm -rf .venv demo build *.egg-info
