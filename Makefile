# `make demo` and `make test` do all their own set-up; a second run skips what is done.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
TOOLS := .venv/.release
PINS := $(CURDIR)/constraints.txt

# Processes, networks and mounts that end with the tests: `ray stop` reaches nobody else's Ray.
APART := unshare --net --pid --fork --mount --mount-proc --kill-child

.PHONY: help demo test test-all chaos cluster-test bench docs check format lock audit release clean

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
	@echo "make audit     look the pins up among the known vulnerabilities"
	@echo "make release   audit, build and try a release, with a bill of materials, in dist/"

$(READY): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "$(PYTHON) is older than 3.11: name another, as in make PYTHON=python3.12 demo." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(READY)
	$(BIN)/mlvicx demo --out demo

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: check
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not chaos and not cluster and not gpu"

test-all: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --timeout=900 -m "slow and not alone and not gpu"
	$(BIN)/python -m pytest -m "slow and alone and not gpu"

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

lock: $(TOOLS)
	$(BIN)/python -m pip freeze --all --exclude pip --exclude-editable > constraints.txt

$(TOOLS): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(PINS) -e '.[release]'
	touch $@

# pip-audit calls a pin that the service does not know a warning; --strict makes it an error.
ifeq ($(AUDIT),skip)
audit:
	@echo "AUDIT=skip: the pins of constraints.txt were not audited." >&2
else
audit: $(TOOLS)
	@found=$$($(BIN)/pip-audit --strict --progress-spinner off --disable-pip --no-deps -r $(PINS)) \
	&& echo "constraints.txt: no pin has a known vulnerability." >&2 \
	|| if [ "$$found" ]; then echo "$$found"; \
	echo "constraints.txt: these pins have known vulnerabilities; raise them." >&2; exit 1; \
	else echo "constraints.txt: the pins were not audited, since the service did not answer for all" \
	"of them; run this where pypi.org can be reached, or give AUDIT=skip." >&2; exit 1; fi
endif

# The wheel is made from the sdist, and tried in an environment that holds it and its pins alone, in
# a folder from which nothing here can be imported.
release: $(TOOLS) audit
	rm -rf dist
	PIP_CONSTRAINT=$(PINS) $(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*
	trial=$$(mktemp -d) && trap 'rm -rf "$$trial"' EXIT && wheel=$$(echo $(CURDIR)/dist/*.whl) \
	&& $(PYTHON) -m venv --without-pip "$$trial/venv" \
	&& $(BIN)/python -m pip --python "$$trial/venv" install --quiet -c $(PINS) "$$wheel" \
	&& $(BIN)/python -m pip --python "$$trial/venv" freeze --exclude mlvicx_dist > "$$trial/there" \
	&& if grep -vxFf $(PINS) "$$trial/there"; then \
	echo "constraints.txt: these packages are not pinned; run make lock." >&2; exit 1; fi \
	&& version=$$(basename "$$wheel" | cut -d - -f 2) \
	&& sed "s/^dynamic = .*/version = \"$$version\"/" pyproject.toml > "$$trial/pyproject.toml" \
	&& $(BIN)/cyclonedx-py environment --pyproject "$$trial/pyproject.toml" --output-reproducible \
	--output-file "$${wheel%.whl}.cdx.json" "$$trial/venv" \
	&& cd "$$trial" && env -u PYTHONPATH -u RAY_ADDRESS venv/bin/mlvicx demo --out demo

clean:
	rm -rf .venv demo site
