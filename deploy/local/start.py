"""One start of a cluster: what has to happen, in which order, and what of it at the same time.

A start can be called off at any moment; then, as after a failure, nothing of it keeps running, and what it left half
done is done again by the next one.
"""

from __future__ import annotations

import hashlib
import signal as signals
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Protocol

import psutil

from deploy.local import ClusterError, leftovers, readiness
from deploy.local.control import Control
from deploy.local.layout import CHECKOUT, Layout, Name, Secrets, write_json
from deploy.local.mariadb import MariaDb
from deploy.local.ports import Claims, choose_ports, port_is_free
from deploy.local.postgres import Postgres, data_folders
from deploy.local.programs import OURS, Plan, Sizes, kind_of, port_names, processes
from deploy.local.servers import Binaries, Tools

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from deploy.local.databases import Databases

ENGINES: Mapping[str, type[Databases]] = {"postgresql": Postgres, "mariadb": MariaDb}

TITLES = {
    "redis": "Redis",
    "nginx": "NGINX",
    "payments": "Payment provider",
    "smtp": "SMTP sink",
    "switchboard": "Switchboard",
}


class Progress(Protocol):
    """Told what is being done; `step` surrounds a piece of work, `say` is a remark. Called from several threads."""

    def step(self, title: str) -> AbstractContextManager[None]:
        """Surround the work that `title` names."""

    def say(self, text: str) -> None:
        """Pass on a remark."""


class Silence:
    """Progress for those who do not watch."""

    def step(self, title: str) -> AbstractContextManager[None]:  # noqa: ARG002 - the protocol's
        """Say nothing."""
        return nullcontext()

    def say(self, text: str) -> None:
        """Say nothing."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What somebody wants to run; see `Cluster` for the meaning of each."""

    port: int | None = None
    sizes: Sizes = field(default_factory=Sizes)
    environment: Mapping[str, str] = field(default_factory=dict)
    seed: bool = True
    reload: bool = False
    database: str = "postgresql"
    doors: Mapping[str, int] = field(default_factory=dict)
    storage: str | None = None
    durable: bool = True


class Start:
    """One start of a cluster: what has to happen, in which order, and what of it at the same time."""

    def __init__(self, layout: Layout, wish: Wish, progress: Progress, tools: Tools) -> None:
        self.layout = layout
        self.wish = wish
        self.progress = progress
        self.tools = tools
        self.control = Control(layout)
        self.claims = Claims()
        self.names = wish.sizes.names()
        self.supervisor: subprocess.Popen[bytes] | None = None

    def prepare(self, *, attached: bool) -> None:
        """End leftovers, make folders, passwords and ports, and write down what is to run."""
        account = self.tools.account
        self.layout.create(account)
        leftovers.end_all(self.layout, data_folders(self.layout), self.progress.say)
        self.layout.tidy()
        self.secrets = Secrets.load(self.layout)
        ports = choose_ports(self.layout, port_names(self.names), self.claims, usual=self.wish.port is not None)
        if "nginx" in self.names:
            ports["nginx"] = self._nginx_port()
        binaries = Binaries.find(self.layout, account, self.wish.environment)
        engine = ENGINES[self.wish.database]
        self.databases = engine(self.layout, self.secrets, binaries, self.tools, ports, durable=self.wish.durable)
        self.plan = Plan(
            self.layout,
            self.secrets,
            binaries,
            self.databases,
            ports,
            self.names,
            self.wish.environment,
            self.wish.reload,
            self.wish.doors,
            self.wish.storage,
        )
        if self._of(*OURS):
            _check_settings(self.plan.environment())
        self.programs = {name: self.plan.program(name) for name in self.names}
        write_json(self.layout.environment, self.plan.environment())
        entries = [program.entry() for program in self.programs.values()]
        write_json(self.layout.programs, {"url": self.plan.url, "attached": attached, "processes": entries})

    def run(self, lock: int) -> subprocess.Popen[bytes]:
        """Start everything and return when all of it is ready."""
        self.supervisor = self.control.launch([lock, *self.claims.descriptors], self.tools)
        self.claims.release()
        servers = [self._bring_up(name) for name in self._of("redis", "payments", "smtp")]
        self._together(self._databases, *servers)
        if self._of(*OURS) and self.wish.seed and not self.layout.seeded.exists():
            with self.progress.step("Seeding products, warehouses and profiles"):
                self._command("seed")
            self.layout.seeded.touch()
        self._together(*(self._bring_up(name) for name in self._of(*OURS)))
        self._together(*(self._bring_up(name) for name in self._of("nginx", "switchboard")))
        return self.supervisor

    def call_off(self) -> None:
        """Stop whatever was started."""
        self.tools.cancelled.set()
        self.claims.release()
        if self.supervisor:
            self.supervisor.send_signal(signals.SIGTERM)
            self.supervisor.wait()
            # A supervisor that was killed has stopped nothing.
            leftovers.end_recorded(self.layout)

    def _databases(self) -> None:
        shards = [self.databases.of_shard(shard) for shard in range(self.wish.sizes.shards)]
        if self.databases.primary not in self.names:
            return
        self._together(*(partial(self._primary, shard) for shard in shards))
        replicas = self._of("replica")
        self._together(self._migrate, *(self._bring_up(name) for name in replicas))
        for shard in shards:
            own = [name for name in replicas if Name.of(name).shard == shard.shard]
            if own:
                readiness.wait(
                    self.programs[own[0]], partial(shard.streams_to, own), partial(self._deaths, *own), self.tools
                )

    def _primary(self, shard: Databases) -> None:
        with self.progress.step(f"{shard.title} {shard.primary}"):
            shard.prepare_primary()
            self._start_and_wait(shard.primary)
            shard.state_roles([name for name in self._of("replica") if Name.of(name).shard == shard.shard])

    def _migrate(self) -> None:
        # The number of shards too: a shard that is new has no tables yet.
        wanted = f"{_fingerprint(CHECKOUT / 'migrations')} {self.wish.sizes.shards}"
        done = self.layout.migrated.read_text() if self.layout.migrated.exists() else ""
        # Asking the database costs a second of importing; the same files have left nothing to do.
        if self._of(*OURS) and done != wanted:
            with self.progress.step("Migrations"):
                self._command("migrate")
            self.layout.migrated.write_text(wanted)

    def _bring_up(self, name: str) -> Callable[[], None]:
        kind = kind_of(name)
        titles = TITLES | {"replica": self.databases.title}
        title = f"{titles.get(kind, '')} {name if kind in {'replica', *OURS} else ''}".strip()

        def work() -> None:
            with self.progress.step(title):
                if kind == "replica":
                    self.databases.of_shard(Name.of(name).shard).prepare_replica(name)
                self._start_and_wait(name)

        return work

    def _start_and_wait(self, name: str) -> None:
        program = self.programs[name]
        self.control.start(name)
        readiness.wait(
            program,
            lambda: readiness.is_ready(program, self.layout, self.secrets, self.plan.binaries, self.tools),
            lambda: self._deaths(name),
            self.tools,
        )

    def _deaths(self, *names: str) -> int:
        if self.supervisor is None or self.supervisor.poll() is not None:
            raise ClusterError("The cluster was stopped while it was starting.")
        return sum(process.restarts for process in processes(self.layout) if process.name in names)

    def _command(self, command: str) -> None:
        self.tools.run(
            [sys.executable, "-m", "app.cli", command],
            folder=CHECKOUT,
            environment=self.plan.environment(),
            as_caller=True,
        )

    def _of(self, *kinds: str) -> list[str]:
        return [name for name in self.names if kind_of(name) in kinds]

    def _together(self, *jobs: Callable[[], None]) -> None:
        """Do all jobs at once; the first failure calls off the others and is raised."""
        if not jobs:
            return
        failed = True
        with ThreadPoolExecutor(len(jobs), thread_name_prefix="start") as pool:
            futures = [pool.submit(job) for job in jobs]
            try:
                for future in as_completed(futures):
                    future.result()
                failed = False
            finally:
                if failed:
                    self.tools.cancelled.set()

    def _nginx_port(self) -> int:
        wanted = self.wish.port
        if wanted is None:
            return choose_ports(self.layout, ["nginx"], self.claims, usual=False)["nginx"]
        if not port_is_free(wanted):
            raise ClusterError(
                f"Port {wanted} is in use{_user_of(wanted)}. "
                f"Choose another: PORT={wanted + 1} make run, or scaleout up --port {wanted + 1}."
            )
        return wanted


def _check_settings(environment: Mapping[str, str]) -> None:
    """Refuse what our processes would refuse, before any server is started for them."""
    from app.core.settings import SettingsError, load_settings  # noqa: PLC0415 - a third of a second, for a start only

    try:
        load_settings(environment)
    except SettingsError as error:
        raise ClusterError(f"These settings keep it from starting:\n{error}") from error


def _fingerprint(folder: Path) -> str:
    """What tells one state of the files in `folder` from another."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _user_of(port: int) -> str:
    """Who listens on a port, in words, as far as this user may know."""
    try:
        for connection in psutil.net_connections("tcp"):
            here = connection.laddr and connection.laddr.port == port
            if here and connection.status == psutil.CONN_LISTEN and connection.pid:
                return f" by {psutil.Process(connection.pid).name()} (process {connection.pid})"
    except psutil.Error:
        return ""
    return ""
