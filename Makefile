# make demo, make run, make test: each sets up all that it needs and is safe to repeat.
#   make demo EXIT=1     stop after the job
#   make run PORT=8000   another port
#   HOME_DIR=DIR         another home folder than ~/.delta-studio

PYTHON ?= $(firstword $(foreach name,python3.13 python3.12 python3.11 python3 python,\
	$(shell $(name) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(name))))
VENV := .venv
STUDIO := $(VENV)/bin/studio
OPTIONS := $(if $(HOME_DIR),--home $(HOME_DIR)) $(if $(PORT),--port $(PORT))
MIN_FREE_MIB := 4096
PIP := $(VENV)/bin/pip install --quiet --constraint constraints.txt
NO_PACKAGES := { echo "Installing failed, as pip says above: is the package index reachable and the disk not full?" >&2; exit 2; }

.PHONY: demo run test check soak screenshots setup secrets clean

demo: setup
	@$(STUDIO) demo $(OPTIONS) $(if $(EXIT),--exit)

run: setup
	@$(STUDIO) up $(OPTIONS)

test: $(VENV)/.installed-dev
	@.ci/system-packages
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy
	@$(VENV)/bin/lint-imports --no-cache
	@$(VENV)/bin/pytest

check: $(VENV)/.installed-dev
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy && \
	$(VENV)/bin/lint-imports --no-cache && $(VENV)/bin/pytest -m "not slow"

# Chaos and metrics for as long as it takes to believe them (two hours), and a table.
soak: $(VENV)/.installed-dev
	@.ci/system-packages
	@SOAK=1 $(VENV)/bin/pytest -q tests/soak; code=$$?; $(VENV)/bin/python -m tests.soak; exit $$code

# The README's pictures, made by the browser test's own code.
screenshots: $(VENV)/.installed-dev
	@.ci/system-packages
	@$(VENV)/bin/pytest -q tests/e2e/test_browser.py
	@mkdir -p docs/screenshots
	@for page in datasets inspector tokens train runs artifacts chat; do \
		cp test-output/screenshots/$$page-1440.png docs/screenshots/$$page.png; done

setup: $(VENV)/.installed

# torch comes first and pinned: its pinned file is the CPU build, and nothing after it pulls in
# another one.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(if $(PYTHON),,echo "Python 3.11 or newer is missing: install it, then repeat the command." >&2; exit 2)
	@$(PYTHON) -m venv --help >/dev/null 2>&1 || { echo "Python's venv module is missing: install python3-venv, then repeat the command." >&2; exit 2; }
	@test "$$(df -Pm . | awk 'NR == 2 {print $$4}')" -ge $(MIN_FREE_MIB) || test -d $(VENV) || \
		{ echo "The disk has less than $(MIN_FREE_MIB) MiB free: free some space, then repeat the command." >&2; exit 2; }
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing Delta Studio into $(VENV) (a few minutes the first time) ..."
	@$(PIP) torch && $(PIP) --editable . || $(NO_PACKAGES)
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@$(PIP) --editable '.[dev]' || $(NO_PACKAGES)
	@touch $@

# The passwords of docker-compose.yml, made once and kept. Compose mounts the files as they are, and
# each service reads them as a user of its own: so the files may be read, and their folder may not.
secrets: secrets/redis_password.txt secrets/postgres_password.txt

secrets/%.txt:
	@mkdir -p -m 0700 secrets
	@head -c 24 /dev/urandom | od -A n -v -t x1 | tr -d ' \n' > $@.new
	@chmod 0444 $@.new && mv $@.new $@

clean:
	rm -rf $(VENV) build test-output
