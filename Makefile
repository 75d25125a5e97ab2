# `make demo` and `make test` do all their own set-up; a second run skips what is done.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

# Processes, networks and mounts that end with the tests: `ray stop` reaches nobody else's Ray.
APART := unshare --net --pid --fork --mount --mount-proc --kill-child

.PHONY: help demo test test-all chaos cluster-test bench docs check format lock clean

help:
	@echo "make demo      phantoms -> shards -> pretrain -> probe -> report, in demo/"
	@echo "make test      style, types and the quick tests"
	@echo "make test-all  the slow tests"
	@echo "make chaos     attacks on runs, the short ones and the long ones"
	@echo "make cluster-test  ray up, jobs and ray down between machines of their own (root, sshd, rsync)"
	@echo "make bench     all benchmarks, into benchmarks/RESULTS.md"
	@echo "make docs      the documentation as a site, in site/"
	@echo "make check     style and types only"
	@echo "make format    rewrite the code in the house style"
	@echo "make lock      pin the newest versions in constraints.txt"

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(READY)
	$(BIN)/mlvicx demo --out demo

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: check
	$(BIN)/python -m pytest -m "not slow and not chaos and not cluster and not gpu"

test-all: $(READY)
	$(BIN)/python -m pytest -m "slow and not gpu"

chaos: $(READY)
	$(BIN)/python -m pytest -m chaos

cluster-test: $(READY)
	MLVICX_OWN_NETWORK=1 $(APART) $(BIN)/python -m pytest -m cluster

bench: $(READY)
	$(BIN)/python benchmarks/run.py

docs: $(READY)
	$(BIN)/python docs/generate.py
	$(BIN)/zensical build --strict --clean

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock:
	$(BIN)/python -m pip freeze --exclude-editable > constraints.txt

clean:
	rm -rf .venv demo site
