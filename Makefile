# Needs make and a Python >= 3.11 (`make PYTHON=python3.12 test` picks another one).
PYTHON ?= python3
BIN := .venv/bin

# Tests start a hundred processes, each of which would compile capfilt anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: .venv demo test test-slow test-gpu test-faults check audit format clean

.venv: .venv/.stamp

# torch goes first and pinned: pip then takes the CPU build where one lies on disk, not the newest CUDA build.
.venv/.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("capfilt needs Python >= 3.11, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (a few minutes the first time)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt torch==2.13.0
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: .venv/.stamp
	@$(BIN)/capfilt bootstrap --rounds 2

test: .venv/.stamp
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 3 --dist worksteal -m 'not slow'

# What takes seconds of a core each: kills, lost nodes, whole runs against their goldens, trainings beside each other.
test-slow: .venv/.stamp
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadscope -m slow

# On a machine with a GPU: with its own python where that has torch for CUDA, transformers, pydantic, pyarrow, webdataset
# and pytest, `python -m pytest -c tests/gpu/pytest.ini tests/gpu`.
test-gpu: .venv/.stamp
	@$(BIN)/python -m pytest -q -c tests/gpu/pytest.ini tests/gpu

# Every fault with ten seeds: half an hour, and as much for trainings; writes docs/faults.md.
test-faults: .venv/.stamp
	@CAPFILT_FAULTS=10 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/faults

check: .venv/.stamp
	@$(BIN)/ruff format --check -q .
	@$(BIN)/ruff check -q .
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/lint-imports --no-logo --no-cache

# Known vulnerabilities of what constraints.txt pins; without network: make audit ADVISORIES=all.zip
audit: .venv/.stamp
	@$(BIN)/python deploy/audit.py $(if $(ADVISORIES),--advisories $(ADVISORIES))

format: .venv/.stamp
	@$(BIN)/ruff check -q --fix-only .
	@$(BIN)/ruff format -q .

clean:
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find capfilt tests deploy -name __pycache__ -type d -prune -exec rm -rf {} +
