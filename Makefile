# For users: `make run`. For contributors: `make setup`, `make unit`, `make check`, `make test`; CONTRIBUTING.md says when.
# All of them work on a bare Debian 12 or 13 with python3 and make.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Hundreds of processes of Tidegate start in the tests, benches and drills: without bytecode each would compile all of its code.
export PYTHONDONTWRITEBYTECODE :=
PYTHON_CODE := src tests bench drills examples deploy scripts

help: ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

$(VENV)/.run: pyproject.toml scripts/make-venv locks/run.txt locks/build.txt
	scripts/make-venv $(PYTHON) $(VENV) .run run

$(VENV)/.dev: pyproject.toml scripts/make-venv locks/dev.txt locks/build.txt
	scripts/make-venv $(PYTHON) $(VENV) .dev dev

# In an environment of its own: what looks at packages shares none with them.
SUPPLY := .venv-supply
$(SUPPLY)/.done: locks/supply.txt
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || scripts/install-debian-packages python3-venv
	$(PYTHON) -m venv $(SUPPLY)
	$(SUPPLY)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps --requirement locks/supply.txt
	touch $@

run: $(VENV)/.run ## serve the example policy at 127.0.0.1:8080
	exec $(BIN)/tidegate serve --demo

setup: $(VENV)/.dev ## prepare a checkout for changes: a virtual environment in .venv, and the checks as a git hook
	@if git rev-parse --git-dir >/dev/null 2>&1; then $(BIN)/pre-commit install; \
	else echo "no git checkout here: the checks are not installed as a git hook; run make check before you send a change"; fi

unit: $(VENV)/.dev ## run the tests that need Python alone: no root, no Debian packages, no servers; about a minute
	$(BIN)/python -m pytest tests/unit -m unit -n auto --dist loadfile --no-loadscope-reorder

# Many tests wait for servers: six at a time keep two cores busy.
TESTS_AT_ONCE ?= 6
# 1 prints line and branch coverage, for up to 15 % more CPU time; 0 does without.
TESTS_COVERAGE ?= 1

test: $(VENV)/.dev ## install the servers that tests need, run all tests, print what they do not cover
	scripts/install-debian-packages $$(cat scripts/test-packages.txt)
	scripts/fetch-opensearch $(VENV)/opensearch
	$(BIN)/lint-imports --no-cache
	TESTS_COVERAGE=$(TESTS_COVERAGE) $(BIN)/python -m pytest -n $(TESTS_AT_ONCE) --dist loadfile --no-loadscope-reorder

check: $(VENV)/.dev ## check format, style, spelling, types, import layers and image digests; changes nothing
	$(BIN)/ruff format --check $(PYTHON_CODE)
	$(BIN)/ruff check $(PYTHON_CODE)
	$(BIN)/codespell
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python scripts/pin_images.py --check

format: $(VENV)/.dev ## format the code and fix what the linter can fix
	$(BIN)/ruff check --fix $(PYTHON_CODE)
	$(BIN)/ruff format $(PYTHON_CODE)

bench: $(VENV)/.dev ## measure speed and memory, beside other rate limiters
	scripts/install-debian-packages wrk nghttp2-client redis-server postgresql nginx
	$(BIN)/python -m bench

bench-smoke: $(VENV)/.dev ## run every measurement at its smallest size, to see that it works
	scripts/install-debian-packages wrk nghttp2-client redis-server postgresql nginx
	$(BIN)/python -m bench --smoke

DRILL_PACKAGES := redis-server redis-sentinel postgresql haproxy libfaketime wrk pg-auto-failover-cli "postgresql-15-auto-failover|postgresql-17-auto-failover" keepalived iproute2 curl

stack: $(VENV)/.dev ## start three instances behind HAProxy with Redis and PostgreSQL; REDIS=cluster, sentinel or standalone
	@scripts/install-debian-packages $(DRILL_PACKAGES)
	@$(BIN)/python -m drills.stack_command up --redis $(or $(REDIS),cluster) --instances $(or $(INSTANCES),3)

stack-status: $(VENV)/.dev ## show the processes of make stack, their addresses and their health
	@$(BIN)/python -m drills.stack_command status

stack-down: $(VENV)/.dev ## end the processes of make stack
	@$(BIN)/python -m drills.stack_command down

drill: $(VENV)/.dev ## run one failure drill, on real servers under load: NAME=redis-cluster-master; without NAME, list them
	@scripts/install-debian-packages $(DRILL_PACKAGES)
	$(BIN)/python -m drills $(or $(NAME),--list)

drills: $(VENV)/.dev ## run all failure drills: of whole stacks, of Redis, of instances and of balancers
	scripts/install-debian-packages $(DRILL_PACKAGES)
	$(BIN)/python -m drills
	$(BIN)/python -m drills.redis_failures
	$(BIN)/python -m drills.autoscale
	$(BIN)/python -m drills.fleet

drills-smoke: $(VENV)/.dev ## run every drill at its smallest size, to see that it works; NAMES="flood soak" for some
	scripts/install-debian-packages $(DRILL_PACKAGES)
	$(BIN)/python -m drills --smoke $(NAMES)

dashboards: $(VENV)/.dev ## generate the Grafana dashboards in deploy/grafana/json
	PYTHONPATH=deploy/grafana $(BIN)/python -m dashboards

manifests: $(VENV)/.dev ## generate the manifests for the Prometheus operator from deploy/prometheus
	$(BIN)/python deploy/kubernetes/generate.py

docs: $(VENV)/.dev ## make the documentation as a site, in site/
	$(BIN)/python scripts/diagrams.py docs/index.md docs/img/overview.svg
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

lock: $(SUPPLY)/.done ## pin all packages of pyproject.toml by version and hash in locks/; UPGRADE=1 for the newest versions
	scripts/lock $(SUPPLY)/bin/python $(if $(UPGRADE),--upgrade)

audit: $(SUPPLY)/.done ## check the pinned packages for known vulnerabilities
	$(SUPPLY)/bin/python scripts/audit.py

sbom: $(SUPPLY)/.done ## write the image's bill of materials (CycloneDX JSON) to dist/
	$(SUPPLY)/bin/python scripts/sbom.py

pin-images: ## pin the container images in deploy/ to the current digests of their tags
	$(PYTHON) scripts/pin_images.py

clean: ## remove everything that the other commands made
	rm -rf $(VENV) $(SUPPLY) dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache bench/results drills/results site tidegate.db tidegate.db-wal tidegate.db-shm

.PHONY: help run setup unit test check format bench bench-smoke stack stack-status stack-down drill drills drills-smoke dashboards manifests docs lock audit sbom pin-images clean
