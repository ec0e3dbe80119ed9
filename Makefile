# make demo, make test and make bench set up everything they need; each is quick when it is already there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

OLDER_DEEPSPEED ?= 0.18.2 0.19.3
FUZZ_SECONDS ?= 60

.PHONY: demo test lint bench campaign fuzz older-deepspeed clean

demo: $(READY)
	$(BIN)/python examples/demo.py

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files csrc tests/cuda_shim)

bench: $(READY)
	mkdir -p bench
	$(BIN)/python benchmarks/overhead.py --json bench/overhead.json --plot bench/overhead.png

# Every fault in every engine; the tests run a quarter of it.
campaign: $(READY)
	cd tests && PYTHONPATH=support $(abspath $(BIN))/python -m campaign --markdown ../docs/campaign.md

# Every reader of files, some minutes; needs atheris.
fuzz: $(READY)
	$(BIN)/pip install -q -e '.[fuzz]' --no-build-isolation
	for kind in pickle safetensors torch legacy distributed deepspeed index; do \
	  $(BIN)/python tests/fuzz/fuzz_readers.py $$kind --seconds $(FUZZ_SECONDS) || exit 1; \
	done

# The guard on other releases; docs/deepspeed.md says what holds with which.
older-deepspeed: $(READY)
	for version in $(OLDER_DEEPSPEED); do \
	  DS_BUILD_OPS=0 $(BIN)/pip install -q --no-deps --no-build-isolation --target .older/$$version deepspeed==$$version; \
	  PYTHONPATH=.older/$$version $(BIN)/python -m pytest -q -n 2 --timeout 60 tests/integrations/deepspeed/test_deepspeed_kinds.py; \
	done

# DeepSpeed's own set-up needs torch at hand, and must not compile its operators.
$(VENV)/installed: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch setuptools wheel ninja packaging pybind11
	DS_BUILD_OPS=0 $(BIN)/pip install -q -c constraints.txt --no-build-isolation deepspeed
	HALLO_NUMGUARD_BUILD_NATIVE=0 HALLO_NUMGUARD_CUDA=0 $(BIN)/pip install -q -c constraints.txt --no-build-isolation -e '.[test,bench,lint]'
	touch $@

$(READY): $(VENV)/installed setup.py $(wildcard csrc/*.* csrc/*/*.*)
	$(BIN)/pip install -q --no-build-isolation --no-deps -e .
	touch $@

clean:
	rm -rf $(VENV) .older build dist bench *.egg-info hallo_numguard/_native*.so
