"""MariaDB for the cluster: one primary and replicas that follow it by GTID, roles and passwords.

MariaDB is not among the wheels: the machine's own is used, Debian's `mariadb-server` or the folder that
`SCALEOUT_MARIADB_BIN` names. A replica starts empty and replays the primary's whole log, which is never purged here.
What is wanted of a server (users, whom it follows) is stated anew at every start, before it takes connections.
"""

from __future__ import annotations

import os
import shutil
import socket
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pymysql

from deploy.local import ClusterError
from deploy.local.databases import OWNER, Databases
from deploy.local.layout import HOST, give, write_private

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

# Debian puts the server where only root's PATH leads.
FOLDERS = os.pathsep.join(("/usr/sbin", "/usr/bin", "/usr/local/sbin", "/usr/local/bin", "/opt/homebrew/bin"))
# The first byte of a server's greeting after its length: the version of the protocol.
PROTOCOL = 10
ANSWER_SECONDS = 1.0

# Small enough for a laptop with three servers, large enough that instances, workers and tests never wait for a slot.
SETTINGS = """\
[mariadbd]
datadir = {data}
init-file = {data}/scaleout.sql
tmpdir = {tmpdir}
bind-address = 127.0.0.1
port = {port}
# Paths are relative to the data folder: the whole of it may be longer than a socket's name may be.
socket = server.sock
pid-file = server.pid
server-id = {port}
report-host = {name}
skip-name-resolve
skip-slave-start
local-infile = OFF
performance-schema = OFF
max-connections = 200
innodb-buffer-pool-size = 64M
innodb-log-file-size = 48M
character-set-server = utf8mb4
collation-server = utf8mb4_nopad_bin
# A machine that loses its power must not lose an acknowledged write (1), nor a server that is killed (1 or 2).
innodb-flush-log-at-trx-commit = {flush}
sync-binlog = {sync}
log-bin = log
# Rows, because transactions run at READ COMMITTED; a log on every server, because each may become the primary.
binlog-format = ROW
log-slave-updates = ON
gtid-strict-mode = ON
relay-log = relay
# A lost primary is looked for after seconds instead of a minute.
slave-net-timeout = 4
idle-transaction-timeout = 15
innodb-print-all-deadlocks = ON
# Every word counts, also one of two letters; the commonest are left out of searches, not of the index.
innodb-ft-min-token-size = 1
innodb-ft-enable-stopword = OFF
"""
REPLICA_SETTINGS = "read-only = ON\n"

# Each server states its own users, outside of the log. One statement a line: that is how an init file is read.
ROLES = """\
SET SESSION sql_log_bin = 0;
CREATE DATABASE IF NOT EXISTS scaleout;
CREATE USER IF NOT EXISTS root@'127.0.0.1';
CREATE USER IF NOT EXISTS scaleout@'127.0.0.1';
CREATE USER IF NOT EXISTS replicator@'127.0.0.1';
ALTER USER root@'127.0.0.1' IDENTIFIED BY '{superuser}';
ALTER USER scaleout@'127.0.0.1' IDENTIFIED BY '{owner}' WITH MAX_STATEMENT_TIME 10;
ALTER USER replicator@'127.0.0.1' IDENTIFIED BY '{replication}';
GRANT ALL ON *.* TO root@'127.0.0.1' WITH GRANT OPTION;
GRANT ALL ON scaleout.* TO scaleout@'127.0.0.1';
GRANT SLAVE MONITOR ON *.* TO scaleout@'127.0.0.1';
GRANT REPLICATION SLAVE ON *.* TO replicator@'127.0.0.1';
"""
FOLLOW = """\
CHANGE MASTER TO MASTER_HOST = '127.0.0.1', MASTER_PORT = {port}, MASTER_USER = 'replicator', \
MASTER_PASSWORD = '{password}', MASTER_USE_GTID = slave_pos, MASTER_CONNECT_RETRY = 1;
START SLAVE;
"""


class MariaDb(Databases):
    """The servers of one shard."""

    title = "MariaDB"
    scheme = "mariadb"
    superuser = "root"
    stop_signal = "SIGTERM"

    def arguments(self, name: str) -> list[str]:
        """The command line of the server `name`."""
        return [str(program("mariadbd")), f"--defaults-file={self._data(name) / 'scaleout.cnf'}"]

    def prepare_primary(self) -> None:
        """Make the primary's data folder if there is none, and state its settings."""
        self._prepare(self.primary, SETTINGS, "")

    def state_roles(self, replicas: Sequence[str]) -> None:
        """Nothing is left to do: a server states its roles when it starts, and keeps nothing for its replicas."""

    def prepare_replica(self, name: str) -> None:
        """Make the replica's data folder if there is none, and state whom it follows."""
        follow = FOLLOW.format(port=self.ports[self.primary], password=self.secrets.replication)
        self._prepare(name, SETTINGS + REPLICA_SETTINGS, follow)

    def streams_to(self, replicas: Sequence[str]) -> bool:
        """Whether the primary sends its log to all `replicas` now."""
        sent = {row["Host"] for row in self._query(self.primary, "SHOW SLAVE HOSTS")}
        return set(replicas) <= sent

    def _prepare(self, name: str, settings: str, more: str) -> None:
        data, account = self._data(name), self.tools.account
        # Of its own: a server that starts removes every other one's temporary tables from a folder that they share.
        temporary = self.layout.data / f"{name}.tmp"
        temporary.mkdir(mode=0o700, exist_ok=True)
        give(temporary, account)
        if not data.exists():
            draft = self._draft(name)
            # The only way in that it leaves open is the socket in the folder, for root.
            self.tools.run(
                [str(program("mariadb-install-db")), "--no-defaults", f"--datadir={draft}", "--skip-test-db",
                 "--auth-root-authentication-method=socket", "--auth-root-socket-user=root"],
                folder=self.layout.data,
                environment={"PATH": FOLDERS, "LC_ALL": "C", "TZ": "UTC", "TMPDIR": str(temporary)},
            )  # fmt: skip
            draft.rename(data)
        if not (data / "mysql").is_dir():
            raise self._refuse(data)
        roles = ROLES.format(
            superuser=self.secrets.superuser, owner=self.secrets.owner, replication=self.secrets.replication
        )
        write_private(data / "scaleout.sql", roles + more, account)
        write_private(
            data / "scaleout.cnf",
            settings.format(
                data=data,
                tmpdir=temporary,
                port=self.ports[name],
                name=name,
                flush=1 if self.durable else 2,
                sync=int(self.durable),
            ),
            account,
        )

    def _query(self, name: str, statement: str) -> Sequence[dict[str, Any]]:
        connection = pymysql.connect(
            host=HOST,
            port=self.ports[name],
            user=self.superuser,
            password=self.secrets.superuser,
            database=OWNER,
            connect_timeout=int(ANSWER_SECONDS),
            cursorclass=pymysql.cursors.DictCursor,
        )
        with closing(connection), connection.cursor() as cursor:
            cursor.execute(statement)
            rows: Sequence[dict[str, Any]] = cursor.fetchall()
        return rows


def program(name: str) -> Path | str:
    """The path of one of MariaDB's programs.

    Raises:
        ClusterError: there is none on this machine; the text says how to get it.
    """
    named = os.environ.get("SCALEOUT_MARIADB_BIN", "")
    found = shutil.which(name, path=named) if named else shutil.which(name) or shutil.which(name, path=FOLDERS)
    if found is None:
        raise ClusterError(
            f"There is no {name} {f'in SCALEOUT_MARIADB_BIN={named}' if named else 'on this machine'}. "
            "Install MariaDB 10.6 or newer (Debian and Ubuntu: apt install mariadb-server), "
            "or name the folder of its programs with SCALEOUT_MARIADB_BIN."
        )
    return found


def server_accepts(port: int) -> bool:
    """Whether a MariaDB server greets who connects to `port`."""
    try:
        with socket.create_connection((HOST, port), timeout=ANSWER_SECONDS) as connection:
            greeting = connection.recv(5)
    except OSError:
        return False
    return len(greeting) == 5 and greeting[4] == PROTOCOL  # noqa: PLR2004 - a length of three bytes, a number, the version


if __name__ == "__main__":
    try:
        program("mariadbd"), program("mariadb-install-db")
    except ClusterError as error:
        raise SystemExit(str(error)) from error
