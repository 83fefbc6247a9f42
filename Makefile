# Every target works on a bare machine: it makes .venv, installs into it, and does its work.
#   make quickstart              the whole path, raw text to generated text, on this machine's CPU
#   QUICKSTART=short make quickstart   the same in under two minutes
#   make test | lint | types     what CI runs
#   make test-launch             runs on several hosts, and a real Slurm: many minutes, as root
#   make install PYTHON=python3.12     with another Python (3.10 to 3.13)
#   make install TORCH="torch==2.12.0" with a torch of your choice

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
QUICKSTART ?= full
# Two files of tests at a time: they wait for each other's processes as much as they compute.
PYTEST_WORKERS ?= 2
PYTEST_ARGUMENTS ?=

.PHONY: install test test-launch lint types quickstart clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml setup.py tools/install_torch.py
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v <= (3, 13) else \
	  "Litespark needs Python 3.10 to 3.13, and $(PYTHON) is %d.%d. Type: make PYTHON=/path/to/python3.12" % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python tools/install_torch.py $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

test: install
	$(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist loadfile $(PYTEST_ARGUMENTS)

# Several hosts and a real Slurm on this machine: root, iproute2, and Debian's slurmctld, slurmd,
# slurm-client and munge; what cannot be had is skipped, and the reason printed.
test-launch: install
	LITESPARK_TEST_LAUNCH=1 $(BIN)/python -m pytest tests/launch $(PYTEST_ARGUMENTS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/shellcheck -x --source-path=SCRIPTDIR/.. launch/*.sh launch/*.sbatch

types: install
	$(BIN)/basedpyright

quickstart: install
	$(BIN)/python examples/quickstart/quickstart.py --size $(QUICKSTART)

clean:
	rm -rf $(VENV) runs build dist *.egg-info
