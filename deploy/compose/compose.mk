# The stack of docker-compose.yml, for people. Included by the Makefile.

COMPOSE := docker compose
# WITH=two-shards, pgbouncer, mysql or observability: the settings in deploy/compose/ of that name.
ifneq ($(WITH),)
export COMPOSE_ENV_FILES := deploy/compose/$(WITH).env
endif
# One sentence instead of Compose's own when there is no engine. DOCKER_HOST names one that is elsewhere.
ENGINE = docker compose version >/dev/null 2>&1 && docker info >/dev/null 2>&1 || { \
	  echo "There is no Docker engine with Compose v2 here. Start one, or say where it is with DOCKER_HOST."; exit 1; }

.PHONY: up compose-down smoke rollout test-compose

up: ## Start the stack of docker-compose.yml (WITH=two-shards, pgbouncer, mysql or observability)
	$(ENGINE)
	$(COMPOSE) build --quiet
	$(COMPOSE) up --detach --wait
	echo "http://127.0.0.1:$${PORT:-8000}  the service    http://127.0.0.1:$${MAIL_PORT:-8025}  its mails"

compose-down: ## Stop the stack; its data stays, WIPE=1 removes it too
	$(ENGINE)
	$(COMPOSE) --profile '*' down $(if $(WIPE),--volumes)

smoke: $(STAMP) ## Buy something at URL, or at PORT of this machine
	$(BIN)/python -m deploy.smoke $(URL)

rollout: ## Replace the stack's instances one by one, without a failed request
	$(ENGINE)
	$(COMPOSE) build --quiet api
	deploy/compose/rollout.sh api

test-compose: $(STAMP) ## Start the stack on free ports, scale it, replace it, break it; STACKS=default: no profiles
	$(ENGINE)
	COMPOSE_TESTS=$(or $(STACKS),all) $(BIN)/python -m pytest tests/deploy/test_compose.py
