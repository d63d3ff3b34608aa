#!/bin/bash
# Replaces the containers of a service one at a time, without a failed request: `rollout.sh [service]`, by default api.
# A new one is added and healthy before an old one is told to stop; that one finishes what it has in hand.
set -euo pipefail
service=${1:-api}
# NGINX asks for the names every 2 s (NGINX_RESOLVER in docker-compose.yml); after that it knows the newcomer.
learned=3

mapfile -t old < <(docker compose ps --quiet "$service")
if ((${#old[@]} == 0)); then
    echo "There is no container of $service. \`make up\` starts the stack." >&2
    exit 1
fi
for container in "${old[@]}"; do
    docker compose up --detach --no-deps --no-recreate --wait --scale "$service=$((${#old[@]} + 1))" "$service"
    sleep "$learned"
    # SIGTERM, and the service's stop_grace_period before SIGKILL.
    docker stop --time 30 "$container" >/dev/null
    docker rm "$container" >/dev/null
done
