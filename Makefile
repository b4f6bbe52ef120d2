# Builds, tests, shows and measures ksmrs. Needs python3 (3.11 or later), cargo and make; all else goes into .venv.
# Every target is incremental: what did not change is not made again.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CARGO_FLAGS := --locked
export PYO3_PYTHON := $(CURDIR)/$(BIN)/python
export PIP_DISABLE_PIP_VERSION_CHECK := 1

SOURCES := Cargo.toml Cargo.lock pyproject.toml README.md LICENSE \
  $(shell find rust python -type f -name '*.rs' -o -type f -name '*.toml' -o -type f -name '*.py' -o -type f -name '*.pyi' -o -type f -name '*.pth' -o -type f -name py.typed)
ENVIRONMENT := $(VENV)/.made
BENCH_ENVIRONMENT := $(VENV)/.bench
WHEEL := dist/.made
INSTALLED := $(VENV)/.installed
MUTANTS := target/mutants/.made

.PHONY: all demo test wheel lint bench mutants cargo-test pytest clean

all: wheel

demo: $(INSTALLED)
	$(BIN)/ksmrs demo --workers 4

test: lint cargo-test pytest

wheel: $(WHEEL)

$(ENVIRONMENT): tests/requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ksmrs needs Python 3.11 or later; name one: make PYTHON=python3.12")'
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r tests/requirements.txt
	touch $@

$(WHEEL): $(SOURCES) | $(ENVIRONMENT)
	rm -f dist/ksmrs-*.whl
	$(BIN)/maturin build --release $(CARGO_FLAGS) --interpreter $(BIN)/python --out dist
	touch $@

$(INSTALLED): $(WHEEL) $(ENVIRONMENT)
	$(BIN)/python -m pip install --quiet --no-deps --no-index --force-reinstall dist/ksmrs-*.whl
	touch $@

lint: $(INSTALLED)
	cargo fmt --all --check
	cargo clippy $(CARGO_FLAGS) --workspace --all-targets -- -D warnings
	$(BIN)/ruff check python tests benches
	$(BIN)/ruff format --check python tests benches
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest --allowlist tests/stubtest-allowlist.txt --ignore-unused-allowlist ksmrs._ksmrs

cargo-test: | $(ENVIRONMENT)
	cargo test $(CARGO_FLAGS) --workspace
	cargo test $(CARGO_FLAGS) -p ksmrs-sys -p ksmrs-core --features ksmrs-sys/mutants,ksmrs-core/mutants --test '*mutants'

# The package with deliberate errors in it, for the test that the oracle finds them; never installed.
mutants: $(MUTANTS)

$(MUTANTS): $(SOURCES) | $(ENVIRONMENT)
	CARGO_TARGET_DIR=target/with-mutants cargo build --release $(CARGO_FLAGS) -p ksmrs-py --features mutants
	rm -rf target/mutants
	mkdir -p target/mutants
	cp -r python/ksmrs target/mutants/ksmrs
	cp target/with-mutants/release/lib_ksmrs.so target/mutants/ksmrs/_ksmrs.abi3.so
	touch $@

# As whoever calls, and once more as an ordinary user where that is root.
pytest: $(INSTALLED) $(MUTANTS)
	$(BIN)/python -m pytest </dev/null
	$(BIN)/python tests/unprivileged.py </dev/null

# Writes benches/report/; as root also against kernel KSM. BENCH_FLAGS=--quick for small sizes.
bench: $(INSTALLED) $(BENCH_ENVIRONMENT)
	$(BIN)/python benches/report.py $(BENCH_FLAGS)

$(BENCH_ENVIRONMENT): benches/requirements.txt benches/requirements-alone.txt $(ENVIRONMENT)
	$(BIN)/python -m pip install --quiet -r benches/requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps -r benches/requirements-alone.txt
	touch $@

clean:
	rm -rf $(VENV) dist target
