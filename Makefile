# Each target does all of its own set-up; Python 3.11 or newer is all that has to be there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TORTURE := 40
TORTURE_MINUTES := 60
FUZZ_MINUTES ?= 10
BENCH_VENV := .venv-bench
BENCH_READY := $(BENCH_VENV)/.ready
BENCH ?=

.DEFAULT_GOAL := help
.PHONY: help demo test torture fuzz coverage lint format bench clean

help:            ## list the targets
	@grep -E '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed -E 's/: .*## /\t/' | expand -t 12

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY)   ## train a small GPT, kill it in the middle of a save, resume it bit for bit
	$(BIN)/python examples/train_gpt.py

test: $(READY)   ## the whole test suite
	$(BIN)/python -m pytest -n 3 tests

torture: $(READY) ## the crash tests in their long form, and how long that takes
	@echo "about $(TORTURE_MINUTES) minutes on two cores (59 when last measured): power cuts, kills and errors at every storage operation"
	ASYNCCKPT_TORTURE=$(TORTURE) $(BIN)/python -m pytest -n 3 -s tests/crash tests/test_resume_examples.py tests/distributed/test_promise_9.py \
		tests/object/test_promise_19.py

fuzz: $(READY)    ## hostile checkpoints for FUZZ_MINUTES minutes (10), guided by atheris where that can be installed
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[fuzz]' \
		|| echo "atheris can't be installed for this Python"
	cd tests && ../$(BIN)/python -m hostile.fuzz --minutes $(FUZZ_MINUTES)

coverage: $(READY) ## the branches of format/ and codec/ that the tests of the parsers reach; 90 % of each are demanded
	$(BIN)/python -m coverage run -m pytest -q $(wildcard tests/format tests/codec tests/hostile tests/read/test_shards.py)
	@for package in $(wildcard asyncckpt/format asyncckpt/codec); do \
		$(BIN)/python -m coverage report --include="$$package/*" || exit 1; done

lint: $(READY)   ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## let ruff rewrite the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(BENCH_READY): pyproject.toml constraints.txt benchmarks/requirements.txt
	$(PYTHON) -m venv $(BENCH_VENV)
	$(BENCH_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e . -r benchmarks/requirements.txt
	@touch $@

bench: $(BENCH_READY) ## what a checkpoint costs, library by library: benchmarks/README.md (BENCH=--quick for a short form)
	$(BENCH_VENV)/bin/python -m benchmarks.overlap $(BENCH)

clean:           ## remove what was built
	rm -rf $(VENV) $(BENCH_VENV) dist runs .pytest_cache .mypy_cache \
		.ruff_cache .hypothesis .coverage
