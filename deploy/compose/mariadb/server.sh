#!/bin/bash
# A MariaDB server: the primary, or the replica of the one that PRIMARY names. `server.sh healthy` says whether it is well.
# What is wanted of it (users, whom it follows) is stated anew at every start and kept out of the log. A new replica
# replays the primary's whole log, which is never purged here.
set -euo pipefail
superuser=$(</run/secrets/superuser) owner=$(</run/secrets/owner) replication=$(</run/secrets/replication)

if [[ ${1:-} == healthy ]]; then
    answer=$(MYSQL_PWD=$owner mariadb -h 127.0.0.1 -u scaleout -BNe 'SELECT @@read_only')
    [[ $answer == $([[ -n ${PRIMARY:-} ]] && echo 1 || echo 0) ]]
    exit
fi

wishes=/run/mysqld/scaleout.sql
umask 077
cat >$wishes <<SQL
SET SESSION sql_log_bin = 0;
CREATE DATABASE IF NOT EXISTS scaleout;
CREATE USER IF NOT EXISTS scaleout@'%';
CREATE USER IF NOT EXISTS replicator@'%';
ALTER USER scaleout@'%' IDENTIFIED BY '$owner' WITH MAX_STATEMENT_TIME 10;
ALTER USER replicator@'%' IDENTIFIED BY '$replication';
GRANT ALL ON scaleout.* TO scaleout@'%';
GRANT SLAVE MONITOR ON *.* TO scaleout@'%';
GRANT REPLICATION SLAVE ON *.* TO replicator@'%';
SQL
role=()
if [[ -n ${PRIMARY:-} ]]; then
    role=(--read-only)
    cat >>$wishes <<SQL
CHANGE MASTER TO MASTER_HOST = '$PRIMARY', MASTER_USER = 'replicator', MASTER_PASSWORD = '$replication', MASTER_USE_GTID = slave_pos, MASTER_CONNECT_RETRY = 1;
START SLAVE;
SQL
fi
# A folder in memory, which not every engine makes with the owner that the image gave it.
chown mysql /run/mysqld $wishes
umask 022
export MARIADB_ROOT_PASSWORD=$superuser MARIADB_ROOT_HOST=localhost
# The log begins with what the service does: the image's own set-up, which differs from server to server, stays out.
exec docker-entrypoint.sh mariadbd --init-file=$wishes --server-id="$SERVER_ID" --log-bin=log --skip-slave-start "${role[@]}"
