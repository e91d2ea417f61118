# make train | test | matrix | lint | check | docs | support | grid | mutants | race | cost | soak |
# trials | clean.
# A fresh machine needs Python 3.11 or newer, and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Named after what was installed: other requirements, another name, another installation.
INSTALLED := $(VENV)/installed-$(shell cat requirements.txt requirements-alone.txt pyproject.toml | cksum | cut -d ' ' -f 1)
# More threads than one slow down models as small as those of the tests, and two runs share the cores.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: train test matrix lint check docs support grid mutants race cost soak trials clean

train: $(INSTALLED)
	$(BIN)/python train.py optimizer=natgrad

# Neighbouring tests on the same core, so that what a file of tests sets up is set up once.
test: $(INSTALLED)
	mkdir -p build
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 --dist worksteal --junitxml=build/tests.xml

# The tests of the package with the oldest and the newest torch and Lightning that it admits.
matrix: $(INSTALLED)
	$(ONE_THREAD) $(BIN)/nox

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check:
	.ci/run

# The site, in build/site: open its index.html. Material only announces its successor otherwise.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

# docs/support.md, from the markers of the tests.
support: $(INSTALLED)
	$(BIN)/python -m tests.support

# That no choice of rate, radius and damping makes a run end above its start: half an hour.
grid: $(INSTALLED)
	$(ONE_THREAD) $(BIN)/python -m experiments.grid

# Which small changes of the core the tests notice, hours; a second call goes on where the first one
# stopped. `make mutants ONLY=trust_region` for a file or a folder, SAMPLE=40 for so many of a file.
mutants: $(INSTALLED)
	$(ONE_THREAD) $(BIN)/python -m experiments.mutants \
		$(if $(ONLY),--only $(ONLY)) $(if $(SAMPLE),--sample $(SAMPLE))

# Against tuned optimizers, hours; `make race QUICK=1` to try it out. Each stage goes on where it
# stopped, and those of different workloads can run at the same time.
race: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-deps --requirement experiments/race/requirements.txt
	for stage in tune run memory table; do \
		$(ONE_THREAD) $(BIN)/python -m experiments.race $$stage $(if $(QUICK),--quick) || exit 1; \
	done

# What a step costs: docs/cost.md, most of an hour; `make cost QUICK=1` only prints small sizes.
cost: $(INSTALLED)
	$(ONE_THREAD) $(BIN)/python -m experiments.cost $(if $(QUICK),--quick,--measure)

# 20,000 steps with faults, beside as many without: docs/soak.md, most of an hour.
soak: $(INSTALLED)
	$(ONE_THREAD) $(BIN)/python -m experiments.soak

# Other people's projects, each in an environment of its own outside the repository; nothing else
# needs them. `make trials TRIALS=molecules` for one.
TRIALS := demos equations molecules forecasting uncertainty
TRIALS_HOME := $(HOME)/.cache/ngplugin-trials

trials:
	for trial in $(TRIALS); do \
		$(PYTHON) -m venv $(TRIALS_HOME)/$$trial && \
		$(TRIALS_HOME)/$$trial/bin/python -m pip install --quiet \
			--requirement experiments/trials/requirements/$$trial.txt && \
		$(ONE_THREAD) PYTHONPATH=src:. $(TRIALS_HOME)/$$trial/bin/python \
			-m experiments.trials.$$trial || exit 1; \
	done
	PYTHONPATH=src:. $(TRIALS_HOME)/$(firstword $(TRIALS))/bin/python -m experiments.trials.table

$(INSTALLED):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "$(PYTHON) is Python %d.%d, but 3.11 or newer is needed; try: make PYTHON=python3.12" % sys.version_info[:2])'
	@$(PYTHON) -m venv $(VENV) || (echo "No virtual environment could be made; on Debian: apt install python3-venv" >&2; exit 1)
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements-alone.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	rm -f $(VENV)/installed-*
	touch $@

clean:
	rm -rf $(VENV) .nox build dist outputs multirun .pytest_cache .mypy_cache .ruff_cache .hypothesis
