PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
SOURCES = $(wildcard csrc/*/*.* csrc/*/*/*.*)
PYTEST = $(VENV)/bin/pytest
NATIVE = CMakeLists.txt $(wildcard csrc/*/*.*)

.DEFAULT_GOAL := help
.PHONY: help demo test lint types quick slow bench format native native-test wheel wheel-test

help:
	@echo "make demo     install raptax and let a small model write"
	@echo "make test     all checks and the quick tests"
	@echo "make slow     the slow tests: real models, long runs"
	@echo "make bench    speed and agreement next to llama.cpp"
	@echo "make lint     formatting, lint, layers of the package, sizes"
	@echo "make format   rewrite the code in the project's format"
	@echo "make native   rebuild the C++ kernels, warnings are errors"
	@echo "make native-test  fuzz them under sanitizers"
	@echo "make wheel    one wheel for every Python, in dist/"

demo: $(VENV)/lm.stamp
	$(VENV)/bin/raptax fetch smollm2
	$(VENV)/bin/raptax generate --chat "What is gravity?" --model smollm2

test: lint types quick

lint: $(VENV)/dev.stamp
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(SOURCES)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/python tools/check_layers.py
	$(VENV)/bin/python tools/check_includes.py
	$(VENV)/bin/python tools/check_size.py

types: $(VENV)/dev.stamp
	$(VENV)/bin/mypy

# Most of the time goes into compiling programs that run once, so XLA optimises less, and
# the tests of a file share what they compile.
quick: $(VENV)/dev.stamp
	XLA_FLAGS=--xla_backend_optimization_level=0 $(PYTEST) -n $(WORKERS) --dist loadfile

slow: $(VENV)/dev.stamp
	$(PYTEST) -m slow -n $(WORKERS)

bench: $(VENV)/dev.stamp
	$(VENV)/bin/pip install --quiet -e '.[bench]'
	$(VENV)/bin/python -m benchmarks.bench_generate
	$(VENV)/bin/python -W ignore -m benchmarks.compare_llama_cpp

format: $(VENV)/dev.stamp
	$(VENV)/bin/ruff check --fix --exit-zero .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(SOURCES)

native: $(VENV)/dev.stamp
	RAPTAX_REQUIRE_NATIVE=1 RAPTAX_WERROR=ON $(VENV)/bin/pip install --no-deps -e .

# 10,000 random problems, as many batches of pages and products with packed weights, shared
# out among the instruction sets, under the sanitizers of addresses and of undefined behaviour; the work queue under
# that of threads.
FUZZ = $(foreach isa,generic avx2 avx512 avx512bf16 amx,RAPTAX_ISA=$(isa) \
	build/tests/paged_fuzz 2000 && RAPTAX_ISA=$(isa) build/tests/packed_fuzz 2000 && \
	RAPTAX_ISA=$(isa) build/tests/attention_fuzz 2000 &&)
native-test: $(VENV)/dev.stamp
	cmake -S . -B build/tests -DRAPTAX_TESTS=ON -DRAPTAX_WERROR=ON \
		-DPython_EXECUTABLE=$(abspath $(VENV)/bin/python)
	cmake --build build/tests --parallel $(WORKERS) \
		--target paged_fuzz packed_fuzz attention_fuzz work_queue_test
	build/tests/work_queue_test
	$(FUZZ) true

wheel: $(VENV)/bin/python
	rm -rf dist
	RAPTAX_REQUIRE_NATIVE=1 $(VENV)/bin/pip wheel --quiet --no-deps --wheel-dir dist .

# The wheel in an environment of its own, of PYTHON, where nothing is compiled.
wheel-test:
	rm -rf build/wheel-venv
	$(PYTHON) -m venv build/wheel-venv
	CC=none CXX=none build/wheel-venv/bin/pip install --quiet --only-binary :all: dist/*.whl
	build/wheel-venv/bin/python tools/check_wheel.py

# Set up once, and again when what is installed or compiled changes.
$(VENV)/lm.stamp: pyproject.toml $(NATIVE) | $(VENV)/bin/python
	$(VENV)/bin/pip install --quiet -e '.[lm]'
	touch $@

$(VENV)/dev.stamp: pyproject.toml $(NATIVE) | $(VENV)/bin/python
	$(VENV)/bin/pip install --quiet -e '.[dev]'
	touch $@ $(VENV)/lm.stamp

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
