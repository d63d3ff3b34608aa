# Everything that a person types here. `make run` and `make test` need Python 3.11+, make and a package index, nothing else.

PYTHON ?= python3
# The one tool that is not in uv.lock, because it reads it.
UV := uv==0.13.8
BIN := .venv/bin
STAMP := .venv/.installed
# Of `make load`: a baseline that two cores carry. It says which limits the cluster needs for it.
URL ?= http://127.0.0.1:$(or $(PORT),8000)
SCENARIO ?= baseline
USERS ?= 20
DURATION ?= 60s
TOOL ?= k6
# Of `make test-failure`: the failure tests that have a long form, and how long they are here; `make test` leaves them out.
LONG_FORMS := $(addprefix tests/failure/test_,crash_points.py broker_outage.py failure_table.py two_shards.py demo.py)
CRASH_ORDERS ?= 200
# Other deaths each time; a run that fails prints its seed.
CRASH_SEED ?= $(shell date +%M%S)
BROKER_OUTAGE ?= 60
MOVER_DEATHS ?= all
DEMO_ENDS ?= all
FAILURE_TABLE ?= all
STORM_SECONDS ?= 60

# A home that cannot be written (a service account, a container) gets its cache beside the packages.
export UV_CACHE_DIR ?= $(shell [ -w "$${HOME:-/nonexistent}" ] || echo "$(CURDIR)/.venv/.cache")
ifeq ($(UV_CACHE_DIR),)
unexport UV_CACHE_DIR
endif

.DEFAULT_GOAL := help
.PHONY: help setup run stop down status test test-mysql test-failure tutorial check audit prove docs load load-compare bench bench-scale bench-reads bench-relay bench-orders bench-saga bench-overload demo failure-table chaos clean
.SILENT:
# Half a virtual environment must not look like a whole one.
.DELETE_ON_ERROR:

help: ## This list
	sed -n 's/^\([a-z -]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24
	echo "  Settings: PORT=8001 INSTANCES=3 SHARDS=2 WORKERS=2 RELAYS=2 REPLICAS=1 DATABASE=mariadb RELOAD=1 PYTHON=python3.12"

setup: $(STAMP) ## Install Python packages and servers into .venv (the others do it themselves)

run: $(STAMP) ## Start the whole cluster and say what to try; Ctrl-C stops it
	exec $(BIN)/scaleout up

stop down: $(STAMP) ## Stop the cluster; its data stays
	$(BIN)/scaleout down

status: $(STAMP) ## Show every process of the cluster
	$(BIN)/scaleout status

test: $(STAMP) ## All tests but those of test-failure, on a cluster of their own; SERVICES=containers: integration, on Docker's
ifeq ($(SERVICES),containers)
	$(ENGINE)
	TEST_SERVICES=containers $(BIN)/python -m pytest tests/integration tests/api
else
	$(BIN)/python -m pytest $(addprefix --ignore=,$(LONG_FORMS))
endif

test-failure: $(STAMP) ## What breaks, in its long form: every fault, 200 orders, a mover killed at 7 points; settable
	CRASH_ORDERS=$(CRASH_ORDERS) CRASH_SEED=$(CRASH_SEED) BROKER_OUTAGE=$(BROKER_OUTAGE) MOVER_DEATHS=$(MOVER_DEATHS) DEMO_ENDS=$(DEMO_ENDS) \
	  FAILURE_TABLE=$(FAILURE_TABLE) STORM_SECONDS=$(STORM_SECONDS) \
	  $(BIN)/python -m pytest $(LONG_FORMS)

tutorial: $(STAMP) ## Do docs/tutorial.md on a copy of the project, and run the tests that it ends with
	$(BIN)/python -m pytest tests/deploy/test_tutorial.py

# About Redis, traces or the edge alone, whichever database stands behind.
NOT_OF_A_DATABASE := $(addprefix --ignore=tests/integration/test_,redis.py redis_deployments.py ratelimit.py tracing.py) \
  $(addprefix --ignore=tests/api/test_,console.py documentation.py headers.py limits.py unreadable.py)

test-mysql: $(STAMP) ## The tests of what talks to a database, on the machine's MariaDB instead of PostgreSQL
	$(BIN)/python -m deploy.local.mariadb && TEST_DATABASE=mariadb $(BIN)/python -m pytest $(NOT_OF_A_DATABASE) \
	  tests/integration tests/api tests/failure/test_read_your_writes.py tests/failure/test_deaths.py \
	  tests/failure/test_promotion.py

# What can be known of a deployment without one.
DEPLOYMENTS := $(addprefix tests/deploy/test_,manifests.py overlay_connections.py autoscaler.py nginx_template.py terraform.py alerts.py site.py dashboards.py)

check: $(STAMP) ## Lint, format, types, import order, claims, migrations, manifests, NGINX's configuration
	echo "ruff"; $(BIN)/ruff check --quiet . && $(BIN)/ruff format --check --quiet .
	echo "mypy"; $(BIN)/mypy --no-error-summary
	echo "import-linter"; said=$$($(BIN)/lint-imports --no-logo) || { echo "$$said"; exit 1; }
	echo "claims"; $(BIN)/python tests/prove.py --check
	echo "migrations"; $(BIN)/python -m app.cli migrate --check
	echo "deployments"; said=$$($(BIN)/python -m pytest -q --no-header $(DEPLOYMENTS)) || { echo "$$said"; exit 1; }

audit: $(STAMP) ## The locked packages against the database of known vulnerabilities, where that can be reached
	$(BIN)/uv sync --frozen --quiet --inexact --group audit
	$(BIN)/python .ci/audit.py

prove: $(STAMP) ## Each claim's test as it is, then with its feature taken out; CLAIM=part of a test's name, AGAIN=1: all, JOBS=2
	$(BIN)/python tests/prove.py $(if $(AGAIN),--again) $(CLAIM)

docs: $(STAMP) ## The docs as a site, in site/; nothing of it is loaded from another host
	$(BIN)/uv sync --frozen --quiet --inexact --group docs
	$(BIN)/python -m deploy.site

load: $(STAMP) ## Customers of the shop: SCENARIO=baseline USERS=20 DURATION=60s TOOL=k6|locust URL=…; USERS=full DURATION=full
	$(BIN)/uv sync --frozen --quiet --inexact --group load
	$(BIN)/python -m loadtests.load --scenario $(SCENARIO) --tool $(TOOL) --url $(URL) \
	  $(if $(filter full,$(USERS)),,--users $(USERS)) $(if $(filter full,$(DURATION)),,--duration $(DURATION))

load-compare: $(STAMP) ## Two reports of make load side by side: A=load/….json B=load/….json
	$(BIN)/python -m loadtests.load.compare $(A) $(B)

bench: $(STAMP) ## The hot path against its limit, in turns on two cores; writes loadtests/bench/results
	$(BIN)/python -m loadtests.bench

bench-reads: $(STAMP) ## Reads without the cache, on far pages of a million rows, and with a second replica
	$(BIN)/python -m loadtests.bench.reads

bench-relay: $(STAMP) ## The relay on one core, with a backlog of 100 and of 10,000; writes loadtests/bench/results
	$(BIN)/python -m loadtests.bench.backlog

bench-orders: $(STAMP) ## What accepting an order costs, against a bare program that writes the same rows
	$(BIN)/python -m loadtests.bench.orders

bench-overload: $(STAMP) ## What an instance still does when three times as much is asked of it as it can do
	$(BIN)/python -m loadtests.bench.overload

bench-scale: $(STAMP) ## 1, 2, 4 and 8 instances with a share of a core each, its law, and a simulation of more; as root
	$(BIN)/uv sync --frozen --quiet --inexact --group bench
	$(BIN)/python -m loadtests.bench.scale

demo: $(STAMP) ## Break one thing after the other in front of you, with live clients, in under 3 minutes
	exec $(BIN)/scaleout demo

failure-table: $(STAMP) ## Break everything once, with clients, and write what they saw into docs/patterns/failure-table.md
	$(BIN)/python -m deploy.chaos.table

chaos: $(STAMP) ## Faults that come and go while clients use it, with a report in chaos/: MINUTES=10 SEED=7
	$(BIN)/python -m deploy.chaos $(if $(MINUTES),--minutes $(MINUTES)) $(if $(SEED),--seed $(SEED))

bench-saga: $(STAMP) ## From an order's acceptance to its confirmation, at half of what one worker can do
	$(BIN)/python -m loadtests.bench.saga

clean: ## Stop the cluster and remove its data, .venv and caches
	[ ! -x $(BIN)/scaleout ] || $(BIN)/scaleout down --wipe
	rm -rf .venv .cluster .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

$(STAMP): uv.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) --version 2>&1 || true). Name another: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "This Python cannot make virtual environments. On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	echo "Installing into .venv: the Python packages of uv.lock and the servers (PostgreSQL, Redis, NGINX) …"
	[ -x $(BIN)/python ] && $(BIN)/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --no-cache-dir --disable-pip-version-check $(UV)
	# A dot every two seconds, for people: a slow line takes minutes for the servers.
	if [ -t 1 ]; then while sleep 2; do printf .; done & dots=$$!; fi; \
	  $(BIN)/uv sync --frozen --quiet --compile-bytecode; status=$$?; \
	  [ -z "$$dots" ] || { kill $$dots; echo; }; exit $$status
	touch $@

include deploy/compose/compose.mk deploy/terraform/terraform.mk
