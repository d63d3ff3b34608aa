#!/bin/bash
# Run once by the image, when the primary's data is new: the roles, the database, and who may stream.
set -euo pipefail
owner=$(</run/secrets/owner) replication=$(</run/secrets/replication)
# The password goes in by standard input: no process list shows it. A statement that fails is not copied to the log.
PGOPTIONS='-c log_min_error_statement=panic' psql -XqAt -v ON_ERROR_STOP=1 -d postgres <<SQL
CREATE ROLE scaleout LOGIN NOSUPERUSER NOCREATEROLE NOCREATEDB PASSWORD '$owner';
CREATE ROLE replicator LOGIN REPLICATION PASSWORD '$replication';
ALTER ROLE scaleout SET statement_timeout = '10s';
-- Which history a replica follows is for its eyes; nothing in it is anybody's data.
GRANT pg_read_all_stats TO scaleout;
ALTER ROLE scaleout SET idle_in_transaction_session_timeout = '15s';
CREATE DATABASE scaleout OWNER scaleout;
REVOKE CONNECT ON DATABASE postgres FROM PUBLIC;
SQL
echo 'host replication replicator all scram-sha-256' >>"$PGDATA/pg_hba.conf"
