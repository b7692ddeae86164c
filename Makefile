PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

# Debian's packages, of which no service is to be started.
apt = { timeout 600 apt-get -qq update && RUNLEVEL=1 timeout 600 \
  apt-get -qq install -y --no-install-recommends $(1) >/dev/null; }

.PHONY: help install demo test test-s3 lint golden lock clean

help: ## Print the targets
	@grep -E '^[a-z0-9-]+:.*##' Makefile | sed 's/:.*##/\t/'

install: $(STAMP) ## Make .venv with the pinned dependencies

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "clip-ray needs Python 3.11 or newer: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $(STAMP)

demo: install ## Run the whole way on the embedded data set
	@$(BIN)/clip-ray demo

lint: install ## Check style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright

# Two files of tests at a time, in their order: they often wait, for Ray or for a time-out. What times
# its faults has the machine for itself.
test: lint ## Check style and types, then run all tests, and the contract of exactness whole
	@command -v redis-server >/dev/null || $(call apt,redis-server) \
	  || echo "redis-server is not there and cannot be installed: its test is skipped" >&2
	@command -v chromium >/dev/null || $(call apt,chromium) \
	  || echo "chromium is not there and cannot be installed: no page is opened in it" >&2
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder \
	  -m "not alone and not exactness" $(NOT_S3)
	@$(BIN)/python -m pytest -m alone $(NOT_S3)
	@$(MAKE) --no-print-directory test-s3
	@$(BIN)/python -m pytest -m exactness -rP --show-capture=stdout

CEPH := radosgw ceph-mon ceph-osd ceph-common
# The longest first: it has one of two processes, and waits often; the other does the rest.
S3_TESTS := tests/training/test_faults.py::test_faults_one_after_the_other_change_nothing \
  tests/training/test_resume.py tests/training/test_checkpoint.py tests/training/test_ledger.py \
  tests/test_storage.py tests/data/test_reader.py tests/cluster/test_store_checks.py

NOT_S3 = $(addprefix --deselect=,$(S3_TESTS))

test-s3: install ## Run what depends on the S3 server against Ceph, if it is there or may be installed
	@command -v radosgw >/dev/null || $(call apt,$(CEPH)) \
	  || echo "Ceph is not there and cannot be installed: the embedded server is taken" >&2
	@CLIP_RAY_TEST_S3=$$(command -v radosgw >/dev/null && echo ceph) \
	  $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(S3_TESTS)

golden: install ## Write the expected config and help texts anew, to be read in the diff
	@CLIP_RAY_GOLDEN=write $(BIN)/python -m pytest -q tests/test_golden.py

lock: ## Pin what is installed in .venv
	@{ head -1 requirements.lock; $(BIN)/pip freeze --exclude-editable; } > requirements.lock.new
	@mv requirements.lock.new requirements.lock

clean: ## Remove .venv
	@rm -rf .venv
