# Two commands matter: `make run` and `make test`. All of them work on a bare Debian 12 or 13 with python3 and make.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTHON_CODE := src tests bench drills examples deploy scripts

help: ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

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

test: $(VENV)/.dev ## install what the tests need and run them all
	scripts/install-debian-packages $$(cat scripts/test-packages.txt)
	scripts/fetch-opensearch $(VENV)/opensearch
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder

check: $(VENV)/.dev ## format, lint, strict types, import layers
	$(BIN)/ruff format --check $(PYTHON_CODE)
	$(BIN)/ruff check $(PYTHON_CODE)
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(VENV)/.dev ## format and mend what the linter can mend
	$(BIN)/ruff check --fix $(PYTHON_CODE)
	$(BIN)/ruff format $(PYTHON_CODE)

bench: $(VENV)/.dev ## measure speed and memory side by side
	scripts/install-debian-packages wrk nghttp2-client redis-server postgresql nginx
	$(BIN)/python -m bench

bench-smoke: $(VENV)/.dev ## the same at its smallest size: that it works, not how fast
	scripts/install-debian-packages wrk nghttp2-client redis-server postgresql nginx
	$(BIN)/python -m bench --smoke

DRILL_PACKAGES := redis-server redis-sentinel postgresql haproxy libfaketime wrk pg-auto-failover-cli "postgresql-15-auto-failover|postgresql-17-auto-failover" keepalived iproute2 curl

stack: $(VENV)/.dev ## run three instances behind HAProxy with Redis and PostgreSQL; REDIS=cluster, sentinel or standalone
	@scripts/install-debian-packages $(DRILL_PACKAGES)
	@$(BIN)/python -m drills.stack_command up --redis $(or $(REDIS),cluster) --instances $(or $(INSTANCES),3)

stack-status: $(VENV)/.dev ## what of it runs, where, and how it is
	@$(BIN)/python -m drills.stack_command status

stack-down: $(VENV)/.dev ## end it
	@$(BIN)/python -m drills.stack_command down

drill: $(VENV)/.dev ## let one thing go wrong with a whole stack under load: NAME=redis-cluster-master; without NAME, list them
	@scripts/install-debian-packages $(DRILL_PACKAGES)
	$(BIN)/python -m drills $(or $(NAME),--list)

drills: $(VENV)/.dev ## all of them, and those of a Redis, of instances and of balancers alone
	scripts/install-debian-packages $(DRILL_PACKAGES)
	$(BIN)/python -m drills
	$(BIN)/python -m drills.redis_failures
	$(BIN)/python -m drills.autoscale
	$(BIN)/python -m drills.fleet

drills-smoke: $(VENV)/.dev ## each at its smallest size: that it works, not how fast; NAMES="flood soak" for some
	scripts/install-debian-packages $(DRILL_PACKAGES)
	$(BIN)/python -m drills --smoke $(NAMES)
	$(BIN)/python -m drills.redis_failures --smoke
	$(BIN)/python -m drills.autoscale --smoke
	$(BIN)/python -m drills.fleet --smoke

dashboards: $(VENV)/.dev ## make the Grafana dashboards in deploy/grafana/json
	PYTHONPATH=deploy/grafana $(BIN)/python -m dashboards

manifests: $(VENV)/.dev ## make what the Prometheus operator wants out of deploy/prometheus
	$(BIN)/python deploy/kubernetes/generate.py

docs: $(VENV)/.dev ## make the documentation as a site, in site/
	$(BIN)/python scripts/diagrams.py docs/index.md docs/img/overview.svg
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

lock: $(SUPPLY)/.done ## write locks/*.txt anew from pyproject.toml; UPGRADE=1 for the newest versions
	scripts/lock $(SUPPLY)/bin/python $(if $(UPGRADE),--upgrade)

audit: $(SUPPLY)/.done ## look the locked packages up in the databases of known vulnerabilities
	$(SUPPLY)/bin/python scripts/audit.py

sbom: $(SUPPLY)/.done ## write the image's bill of materials (CycloneDX JSON) to dist/
	$(SUPPLY)/bin/python scripts/sbom.py

pin-images: ## pin the images of deploy/ to the digests that their tags have now
	$(PYTHON) scripts/pin_images.py

clean: ## remove what the other commands made
	rm -rf $(VENV) $(SUPPLY) dist .mypy_cache .ruff_cache .pytest_cache .hypothesis bench/results drills/results site tidegate.db tidegate.db-wal tidegate.db-shm

.PHONY: help run test check format bench bench-smoke stack stack-status stack-down drill drills drills-smoke dashboards manifests docs lock audit sbom pin-images clean
