#!/bin/bash
# `healthy.sh primary` or `healthy.sh replica`: the server answers, and it is what it is called. A primary that has
# fallen back into recovery, or a replica that was promoted unnoticed, must not count as healthy.
set -euo pipefail
recovering=$(PGCONNECT_TIMEOUT=2 psql -h /var/run/postgresql -XqAt -d postgres -c 'SELECT pg_is_in_recovery()')
# While the image sets up a new primary the server listens on no port yet.
pg_isready -q -t 2 -h 127.0.0.1
[[ $1 == primary && $recovering == f || $1 == replica && $recovering == t ]]
