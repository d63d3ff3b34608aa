"""What a person does to the servers of a shard before, at and after a promotion, in the words of each engine.

It is the runbook of `docs/patterns/promotion.md`, as functions. (PYTEST_DONT_REWRITE: nothing is asserted here.)
"""

from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from conftest import until
from engines import DATABASE, ask

from deploy.local.cluster import Cluster

# Longer than any test: a commit waits for its replica instead of going on without.
FOR_EVER = 3_600_000  # milliseconds


@dataclass(frozen=True)
class Postgres:
    """PostgreSQL's way."""

    shard: Cluster

    async def value(self, node: str, *statements: str, arguments: tuple[Any, ...] = ()) -> Any:
        """Run statements as superuser on a server and return the value of the last one."""
        (row,) = await ask(self.shard.process(node).address, *statements, arguments=arguments)
        return next(iter(row.values()))

    async def wait_for_a_replica(self, primary: str, *replicas: str) -> None:
        """Have every commit of `primary` wait until one of the replicas has it on its disk."""
        names = ", ".join(f'"{name}"' for name in replicas)
        setting = f"ALTER SYSTEM SET synchronous_standby_names = 'ANY 1 ({names})'"
        await self.value(primary, setting, "SELECT pg_reload_conf()")

        async def synchronous() -> bool:
            waited_for = "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'quorum'"
            return bool(await self.value(primary, waited_for) == len(replicas))

        await until(synchronous)

    async def received(self, replica: str) -> int:
        """Return how much of the log a replica has."""
        return int(await self.value(replica, "SELECT pg_last_wal_receive_lsn() - '0/0'"))

    async def promote(self, replica: str) -> None:
        """Make it the primary."""
        await self.value(replica, "SELECT pg_promote()")

    async def follow(self, replica: str, primary: str, before: str) -> None:
        """Have a replica follow the new primary instead of the one before."""
        slot = replica.replace("-", "_")
        await self.value(primary, "SELECT 1 FROM pg_create_physical_replication_slot($1)", arguments=(slot,))
        conninfo = await self.value(replica, "SHOW primary_conninfo")
        old, new = (urlsplit(self.shard.process(node).address or "").port for node in (before, primary))
        conninfo = conninfo.replace(f"port={old}", f"port={new}")
        setting = f"ALTER SYSTEM SET primary_conninfo = '{conninfo}'"
        await self.value(replica, setting, "SELECT pg_reload_conf()")


@dataclass(frozen=True)
class MariaDb:
    """MariaDB's way."""

    shard: Cluster

    async def do(self, node: str, *statements: str) -> list[Any]:
        """Run statements as superuser on a server and return the rows of the last one."""
        return await ask(self.shard.process(node).address, *statements)

    async def value(self, node: str, statement: str, arguments: tuple[Any, ...] = ()) -> Any:
        """Run a statement as superuser on a server and return its value."""
        (row,) = await ask(self.shard.process(node).address, statement, arguments=arguments)
        return next(iter(row.values()))

    async def wait_for_a_replica(self, primary: str, *replicas: str) -> None:
        """Have every commit of `primary` wait until one of the replicas has it on its disk."""
        for replica in replicas:
            await self.do(
                replica, "SET GLOBAL rpl_semi_sync_slave_enabled = ON", "STOP SLAVE IO_THREAD", "START SLAVE IO_THREAD"
            )
        await self.do(
            primary,
            f"SET GLOBAL rpl_semi_sync_master_timeout = {FOR_EVER}",
            "SET GLOBAL rpl_semi_sync_master_wait_point = AFTER_SYNC",
            "SET GLOBAL rpl_semi_sync_master_enabled = ON",
        )

        async def synchronous() -> bool:
            (row,) = await self.do(primary, "SHOW STATUS LIKE 'Rpl_semi_sync_master_clients'")
            return int(row["Value"]) == len(replicas)

        await until(synchronous)

    async def received(self, replica: str) -> int:
        """Return how much of the log a replica has."""
        (row,) = await self.do(replica, "SHOW ALL SLAVES STATUS")
        return int(row["Gtid_IO_Pos"].rpartition("-")[2])

    async def promote(self, replica: str) -> None:
        """Make it the primary, once it has applied all that it has."""
        (row,) = await self.do(replica, "SHOW ALL SLAVES STATUS")
        await self.do(replica, "STOP SLAVE IO_THREAD", f"SELECT MASTER_GTID_WAIT('{row['Gtid_IO_Pos']}')")
        await self.do(replica, "STOP SLAVE", "RESET SLAVE ALL", "SET GLOBAL read_only = OFF")

    async def follow(self, replica: str, primary: str, before: str) -> None:  # noqa: ARG002  # PostgreSQL asks for it
        """Have a replica follow the new primary instead of the one before."""
        port = urlsplit(self.shard.process(primary).address or "").port
        change = f"CHANGE MASTER TO MASTER_PORT = {port}, MASTER_USE_GTID = slave_pos"
        await self.do(replica, "STOP SLAVE", change, "START SLAVE")


Promotion = {"postgresql": Postgres, "mariadb": MariaDb}[DATABASE]
