# make demo, make test and make bench set up everything they need; each is quick when it is already there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Python compiles what it imports; to compile all of torch takes longer than to install it.
INSTALL := $(BIN)/pip install --disable-pip-version-check --quiet --no-compile
READY := $(VENV)/development $(VENV)/cuda

OLDER_DEEPSPEED ?= 0.16.0 0.16.9 0.17.0 0.17.6 0.18.2 0.18.9 0.19.3
FUZZ_SECONDS ?= 60

.PHONY: demo test quick coverage lint bench gpu-test deepspeed-ops-test campaign chaos healthy fuzz differential older-deepspeed lock changelog clean

demo: $(VENV)/package
	$(BIN)/python examples/demo.py

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

# What most changes need, in under a minute.
quick: lint
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow and not deepspeed and not multiprocess and not browser and not gpu" \
	  tests/ops tests/guard tests/files

# Processes that tests start are measured too.
coverage: $(READY)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --cov

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --num-workers 2
	$(BIN)/lint-imports
	$(BIN)/typos
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files csrc tests/cuda_shim)

bench: $(READY)
	mkdir -p bench
	$(BIN)/python benchmarks/overhead.py --json bench/overhead.json --plot bench/overhead.png

# With a GPU, and a torch that can use it: alone, for Triton's interpreter is left off; then DeepSpeed's engines.
gpu-test: $(READY)
	$(BIN)/python -m pytest -q -n 2 -m gpu tests/ops tests/integrations
	DS_ACCELERATOR=cuda $(BIN)/python -m pytest -q -n 4 tests/integrations/deepspeed

# DeepSpeed's own optimizers and NVMe: builds its operators into .ops, some minutes each on one core, then runs the tests
# that need them. The other targets compile none; once they are built `make test` runs these tests too.
deepspeed-ops-test: $(READY)
	MAX_JOBS=$${MAX_JOBS:-1} $(BIN)/python tools/deepspeed_operators.py
	$(BIN)/python -m pytest -q tests/integrations/deepspeed/test_compiled_operators.py

# Every fault in every engine, and every cause in every way of training; the tests run a part of them.
campaign: $(READY)
	cd tests && PYTHONPATH=support $(abspath $(BIN))/python -m campaign --markdown ../docs/campaign.md
	cd tests && PYTHONPATH=support $(abspath $(BIN))/python -m causes --markdown ../docs/causes.md

# Something goes wrong in a random part of the guard, 100 times on one rank, on two and on four; the tests do it for a
# minute.
chaos: $(READY)
	cd tests && PYTHONPATH=support $(abspath $(BIN))/python -m chaos --tries 100

# What people train, guarded and not, for most of an hour; the tests run a part of it.
healthy: $(READY)
	cd tests && PYTHONPATH=support $(abspath $(BIN))/python -m healthy --markdown ../docs/healthy.md

# Every reader of files, some minutes; needs atheris.
fuzz: $(READY)
	$(INSTALL) -c constraints.txt atheris
	for kind in pickle safetensors torch legacy distributed deepspeed index; do \
	  $(BIN)/python tests/fuzz/fuzz_readers.py $$kind --seconds $(FUZZ_SECONDS) || exit 1; \
	done

# What the scanner reads of archives, against torch.load; the tests do it with some hundred.
differential: $(READY)
	$(BIN)/python tests/fuzz/differential.py

# The guard on other releases, a table of docs/deepspeed.md.
older-deepspeed: $(READY)
	for version in $(OLDER_DEEPSPEED); do \
	  test -d .older/$$version || \
	  DS_BUILD_OPS=0 $(INSTALL) --no-deps --no-build-isolation --target .older/$$version deepspeed==$$version || exit 1; \
	done
	cd tests && PYTHONPATH=support $(abspath $(BIN))/python -m releases ../.older --markdown ../docs/deepspeed.md

# torch and what it brings come from pip's own choice, all else from the locks: --no-deps leaves pip nothing to resolve.
# DeepSpeed's own set-up needs torch at hand, and must not compile its operators.
$(VENV)/torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -c constraints.txt torch setuptools wheel ninja packaging pybind11
	touch $@

$(VENV)/demo: $(VENV)/torch requirements/demo.txt
	DS_BUILD_OPS=0 $(INSTALL) --no-deps --no-build-isolation -r requirements/demo.txt
	touch $@

$(VENV)/development: $(VENV)/demo $(addprefix requirements/,test.txt bench.txt lint.txt)
	$(INSTALL) -c constraints.txt triton
	DS_BUILD_OPS=0 $(INSTALL) --no-deps --no-build-isolation $(addprefix -r requirements/,test.txt bench.txt lint.txt)
	touch $@

$(VENV)/package: $(VENV)/demo pyproject.toml setup.py $(wildcard csrc/*.* csrc/*/*.*)
	HALLO_NUMGUARD_CUDA=0 $(INSTALL) --no-build-isolation --no-deps -e .
	touch $@

# Takes a minute of nvcc where there is one, and the demo needs no GPU.
$(VENV)/cuda: $(VENV)/package
	HALLO_NUMGUARD_BUILD_NATIVE=0 $(BIN)/python setup.py -q build_ext --inplace
	touch $@

$(VENV)/release: $(VENV)/torch requirements/release.txt
	$(INSTALL) --no-deps -r requirements/release.txt
	touch $@

# Writes requirements/; `make lock LOCK=--upgrade` moves to the newest versions, `make lock LOCK=--check` asks pip only.
lock: $(VENV)/release
	$(BIN)/python tools/lock.py $(LOCK)

# Shows the fragments of changelog.d/ as the changelog of the next release.
changelog: $(VENV)/release
	$(BIN)/towncrier build --draft --version next

clean:
	rm -rf $(VENV) .older .ops build dist bench *.egg-info hallo_numguard/_native*.so
