"""PostgreSQL for the cluster: one primary, streaming replicas, roles and passwords.

Each data folder is built beside its place and renamed when it is complete, so a start that was killed half-way is
simply done again. What is wanted of a running primary (roles, slots) is stated anew at every start.
"""

from __future__ import annotations

import os
import re
from functools import cached_property
from typing import TYPE_CHECKING

from deploy.local import ClusterError
from deploy.local.databases import Databases
from deploy.local.layout import HOST, Layout, remove_tree, write_private

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from deploy.local.servers import Binaries, Tools

# The first release with a locale provider that is the same on every machine and still knows Unicode's letters.
BUILTIN_LOCALE_SINCE = 17

# Small enough for a laptop with three servers, large enough that instances, workers and tests never wait for a slot.
SETTINGS = """\
listen_addresses = '127.0.0.1'
# Everything connects by TCP; a socket file would be one more thing to leave behind.
unix_socket_directories = ''
port = {port}
max_connections = 200
shared_buffers = 64MB
# A machine that loses its power must not lose an acknowledged write, nor a server that is killed.
fsync = {fsync}
synchronous_commit = on
wal_level = replica
max_wal_senders = 10
max_replication_slots = 10
wal_keep_size = 64MB
# A replica that stays away longer than this many bytes is cloned anew rather than filling the disk.
max_slot_wal_keep_size = 1GB
max_wal_size = 512MB
hot_standby = on
# A long read on a replica must not be cancelled by the primary's vacuum.
hot_standby_feedback = on
# Positions are reported, and a lost primary looked for, every second instead of every ten and five.
wal_receiver_status_interval = 1s
wal_retrieve_retry_interval = 1s
password_encryption = 'scram-sha-256'
# Statements are short; compiling them costs more than it saves.
jit = off
log_destination = 'stderr'
logging_collector = off
log_line_prefix = '%m [%p] %u '
log_checkpoints = off
timezone = 'UTC'
"""

REPLICA_SETTINGS = """\
primary_conninfo = 'host=127.0.0.1 port={primary_port} user=replicator password={password} application_name={name}'
primary_slot_name = '{slot}'
"""

ACCESS = """\
# TYPE  DATABASE     USER        ADDRESS       METHOD
host    all          postgres    127.0.0.1/32  scram-sha-256
host    scaleout     scaleout    127.0.0.1/32  scram-sha-256
host    replication  replicator  127.0.0.1/32  scram-sha-256
"""

# psql's \\gexec runs what the query before it returned: CREATE DATABASE knows no IF NOT EXISTS.
ROLES = """\
SELECT 'CREATE ROLE scaleout' WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'scaleout') \\gexec
SELECT 'CREATE ROLE replicator' WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'replicator') \\gexec
ALTER ROLE scaleout LOGIN NOSUPERUSER NOCREATEROLE NOCREATEDB PASSWORD '{owner}';
ALTER ROLE replicator LOGIN REPLICATION PASSWORD '{replication}';
ALTER ROLE scaleout SET statement_timeout = '10s';
-- Which history a replica follows is for its eyes; nothing in it is anybody's data.
GRANT pg_read_all_stats TO scaleout;
ALTER ROLE scaleout SET idle_in_transaction_session_timeout = '15s';
SELECT 'CREATE DATABASE scaleout OWNER scaleout'
WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = 'scaleout') \\gexec
REVOKE CONNECT ON DATABASE postgres FROM PUBLIC;
"""

# A slot nobody reads keeps write-ahead log for ever, a lost one cannot be read again: both go.
DROP_SLOTS = """\
SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots
WHERE NOT active AND (wal_status = 'lost' OR slot_name <> ALL ('{{{kept}}}'));
"""


class Postgres(Databases):
    """The servers of one shard."""

    title = "PostgreSQL"
    scheme = "postgresql"
    superuser = "postgres"
    # The fast shutdown, which does not wait for clients.
    stop_signal = "SIGINT"

    def arguments(self, name: str) -> list[str]:
        """The command line of the server `name`; it holds no password."""
        return [str(self.binaries.postgres / "postgres"), "-D", str(self._data(name))]

    def prepare_primary(self) -> None:
        """Make the primary's data folder if there is none, and state its settings.

        Raises:
            ClusterError: initdb failed, or the data is of another major version.
        """
        data = self._data(self.primary)
        if not data.exists():
            draft = self._draft(self.primary)
            password = self.layout.data / f"password-{self.shard}"
            write_private(password, self.secrets.superuser, self.tools.account)
            try:
                self._run("initdb", "-D", str(draft), "-U", "postgres", "-A", "scram-sha-256",
                          "--pwfile", str(password), "-E", "UTF8", *self._locale(),
                          "--no-instructions", *self._unsynced)  # fmt: skip
            finally:
                password.unlink()
            with (draft / "postgresql.conf").open("a") as settings:
                settings.write("include 'scaleout.conf'\n")
            draft.rename(data)
        self._check_version(data)
        self._settle(self.primary, "")

    def state_roles(self, replicas: Sequence[str]) -> None:
        """Make roles and database as they should be on the running primary; drop slots of replicas that are no more."""
        self._query(ROLES.format(owner=self.secrets.owner, replication=self.secrets.replication))
        self._query(DROP_SLOTS.format(kept=",".join(_slot(name) for name in replicas)))

    def prepare_replica(self, name: str) -> None:
        """Clone the running primary for the replica `name`, if it has no copy that it can go on from.

        Raises:
            ClusterError: pg_basebackup failed.
        """
        data, slot = self._data(name), _slot(name)
        slots = self._query("SELECT slot_name FROM pg_replication_slots;").split()
        if not data.exists() or slot not in slots:
            remove_tree(data)
            draft = self._draft(name)
            if slot in slots:
                self._query(f"SELECT pg_drop_replication_slot('{slot}');")
            self._run("pg_basebackup", *self._to_primary("replicator"), "-D", str(draft), "-X", "stream",
                      "--checkpoint=fast", "-C", "-S", slot, *self._unsynced,
                      PGPASSWORD=self.secrets.replication)  # fmt: skip
            (draft / "standby.signal").touch()
            os.chown(draft / "standby.signal", draft.stat().st_uid, draft.stat().st_gid)
            draft.rename(data)
        self._check_version(data)
        self._settle(
            name,
            REPLICA_SETTINGS.format(
                primary_port=self.ports[self.primary], password=self.secrets.replication, name=name, slot=slot
            ),
        )

    def streams_to(self, replicas: Sequence[str]) -> bool:
        """Whether the primary sends its log to all `replicas` now."""
        sent = self._query("SELECT application_name FROM pg_stat_replication WHERE state = 'streaming';").split()
        return set(replicas) <= set(sent)

    def _settle(self, name: str, more: str) -> None:
        data, account = self._data(name), self.tools.account
        settings = SETTINGS.format(port=self.ports[name], fsync="on" if self.durable else "off")
        write_private(data / "scaleout.conf", settings + more, account)
        write_private(data / "pg_hba.conf", ACCESS, account)

    def _query(self, statements: str) -> str:
        """Run statements on the primary as superuser; they go in by standard input, which no process list shows."""
        return self._run("psql", *self._to_primary("postgres"), "-d", "postgres", "-X", "-q", "-A", "-t",
                         "-v", "ON_ERROR_STOP=1", text=statements, PGPASSWORD=self.secrets.superuser,
                         # A statement that fails is not copied to the server's log, it may hold a password.
                         PGOPTIONS="-c log_min_error_statement=panic")  # fmt: skip

    def _run(self, tool: str, *arguments: str, text: str = "", **environment: str) -> str:
        program = str(self.binaries.postgres / tool)
        base = {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC", "PGCONNECT_TIMEOUT": "5"}
        return self.tools.run([program, *arguments], folder=self.layout.data, environment=base | environment, text=text)

    def _to_primary(self, role: str) -> list[str]:
        return ["-h", HOST, "-p", str(self.ports[self.primary]), "-U", role]

    @property
    def _unsynced(self) -> list[str]:
        return [] if self.durable else ["--no-sync"]

    def _locale(self) -> list[str]:
        if self._major >= BUILTIN_LOCALE_SINCE:
            return ["--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C"]
        return ["--locale=C.UTF-8"]

    @cached_property
    def _major(self) -> int:
        found = re.search(r"(\d+)", self._run("postgres", "--version").partition(")")[2])
        if not found:
            raise ClusterError(
                f"{self.binaries.postgres / 'postgres'} --version says no version. SCALEOUT_POSTGRES_BIN names another."
            )
        return int(found[1])

    def _check_version(self, data: Path) -> None:
        if not (data / "PG_VERSION").exists():
            raise self._refuse(data)
        written = int((data / "PG_VERSION").read_text())
        if written != self._major:
            raise ClusterError(
                f"The data in {data} was written by PostgreSQL {written}, this is {self._major}. "
                "`scaleout down --wipe` removes it, or name the old version with SCALEOUT_POSTGRES_BIN."
            )


def data_folders(layout: Layout) -> list[Path]:
    """The data folders that exist, of this start's servers and of earlier ones'."""
    return [path for path in layout.data.glob("*") if (path / "PG_VERSION").exists()]


def server_accepts(binaries: Binaries, tools: Tools, layout: Layout, port: int) -> bool:
    """Whether a PostgreSQL server accepts connections on `port`, asked by pg_isready without signing in."""
    try:
        tools.run(
            [str(binaries.postgres / "pg_isready"), "-q", "-t", "1", "-h", HOST, "-p", str(port)],
            folder=layout.data,
            environment={"PATH": os.defpath},
        )
    except ClusterError:
        tools.check()
        return False
    return True


def _slot(name: str) -> str:
    """The replication slot of a replica: slots allow no hyphen."""
    return name.replace("-", "_")
