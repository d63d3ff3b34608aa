"""The processes of a cluster, one by one: what runs, with which arguments and environment, where it is reached.

This is the one place that knows all of them; the supervisor, `cluster.json` and the readiness checks read it from
`programs.json`.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from secrets import token_urlsafe
from typing import TYPE_CHECKING, Any

from app.core.ids import LOGICAL_SHARDS
from deploy.local import ClusterError, nginx, redis
from deploy.local.layout import CHECKOUT, HOST, Name, read_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from deploy.local.databases import Databases
    from deploy.local.layout import Layout, Secrets
    from deploy.local.servers import Binaries

KINDS = (
    "nginx",
    "api",
    "relay",
    "worker",
    "scheduler",
    "primary",
    "replica",
    "redis",
    "payments",
    "smtp",
    "switchboard",
)

# Not part of what is shown and broken: it breaks the others.
UNLISTED = ("switchboard",)

# The kinds that are the application itself: they need a migrated database.
OURS = ("api", "relay", "worker", "scheduler")

# Tiers are stopped from the highest to the lowest: first what breaks others, as a frozen process does not stop; then
# what accepts work, what does it, and last what keeps it.
TIERS = {
    "primary": 1,
    **dict.fromkeys(("replica", "redis", "payments", "smtp"), 2),
    **dict.fromkeys(OURS, 3),
    "nginx": 4,
    "switchboard": 5,
}

# NGINX finishes open requests; how a database is stopped, its engine knows.
STOP_SIGNALS = {"nginx": "SIGQUIT"}

# When everything stops, no balancer is left for which an instance would serve on: SIGINT skips that part of its drain.
DOWN_SIGNALS = {"api": "SIGINT"}

# An instance serves on for 5 s and drains for up to 20 s, and a task may be as long; after that the process is killed.
STOP_SECONDS = 30


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many processes of a kind run; `kinds` leaves out the others altogether."""

    instances: int = 2
    workers: int = 1
    relays: int = 1
    replicas: int = 2
    shards: int = 1
    kinds: tuple[str, ...] = KINDS

    def names(self) -> list[str]:
        """The names of all processes, in the order of `cluster.json`."""
        counts = {"api": self.instances, "relay": self.relays, "worker": self.workers, "replica": self.replicas}
        return [
            name
            for kind in KINDS
            if kind in self.kinds
            for name in [
                *([f"{kind}-{number}" for number in range(1, counts[kind] + 1)] if kind in counts else [kind]),
                *(self._of_further_shards(kind) if kind in {"primary", "replica"} else []),
            ]
        ]

    def _of_further_shards(self, kind: str) -> list[str]:
        # One replica each: what shards do differently shows with one, and a laptop has room for it.
        suffixes = [""] if kind == "primary" else [f"-{number}" for number in range(1, min(1, self.replicas) + 1)]
        return [f"shard{shard}-{kind}{suffix}" for shard in range(1, self.shards) for suffix in suffixes]


@dataclass(frozen=True, slots=True)
class Program:
    """One process: `port` is 0 and `address` None for those that nobody connects to.

    `health` is the URL that answers 200 when it is ready, empty for those that are asked otherwise.
    """

    name: str
    kind: str
    arguments: list[str]
    log: str
    folder: str = str(CHECKOUT)
    uid: int | None = None
    port: int = 0
    address: str | None = None
    http_address: str | None = None
    health: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    order: int = 0
    stop_signal: str = "SIGTERM"
    down_signal: str = "SIGTERM"
    stop_seconds: int = STOP_SECONDS

    @property
    def ready_file(self) -> Path | None:
        """The file that the process makes when it is ready, for those without a port."""
        value = self.environment.get("READY_FILE")
        return Path(value) if value else None

    def entry(self) -> dict[str, Any]:
        """The process as `programs.json` holds it."""
        return asdict(self)


def kind_of(name: str) -> str:
    """The kind of the process `name`: `api` for `api-2`."""
    return Name.of(name).kind


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that the processes of one cluster are made of.

    `doors` are ports at which our processes and NGINX find a server or an instance instead of at its own: of a proxy
    that somebody has put before it. `storage` is a bucket's URL instead of the cluster's own folder.
    """

    layout: Layout
    secrets: Secrets
    binaries: Binaries
    databases: Databases
    ports: Mapping[str, int]
    names: list[str]
    user_environment: Mapping[str, str]
    reload: bool = False
    doors: Mapping[str, int] = field(default_factory=dict)
    storage: str | None = None
    # Of this run: whoever has it may break this cluster's processes.
    switchboard_key: str = field(default_factory=lambda: token_urlsafe(32), repr=False)

    @property
    def reached(self) -> Mapping[str, int]:
        """The port at which each process is found by the others."""
        return {**self.ports, **self.doors}

    @property
    def url(self) -> str:
        """Where clients go: NGINX, or without it the first instance, or nowhere."""
        name = next((name for name in ("nginx", "api-1") if name in self.names), None)
        return f"http://{HOST}:{self.ports[name]}" if name else ""

    def environment(self) -> dict[str, str]:
        """What our processes and commands find in their environment.

        What the user has set goes along; the addresses of this cluster win over it.
        """
        defaults = {
            "REGION": "local",
            "SECRET_KEY": self.secrets.application,
            "PUBLIC_URL": self.url or f"http://{HOST}",
            "TRUSTED_PROXIES": "127.0.0.1/32",
            "ADMIN_ALLOW": "127.0.0.0/8,::1/128",
            "LOG_FORMAT": "json",
        }
        addresses = {"STORAGE_URL": self.storage or self.layout.storage.as_uri()}
        if "primary" in self.names:
            first, *further = shards = self._shards()
            addresses["DATABASE_URL"] = first["primary"]
            addresses["REPLICA_URLS"] = ",".join(first["replicas"])
            if further:
                addresses["SHARDS"] = json.dumps(shards)
        if "redis" in self.names:
            addresses["REDIS_URL"] = redis.address(self.secrets, self.reached["redis"])
        if "payments" in self.names:
            addresses["PAYMENT_URL"] = f"http://{HOST}:{self.reached['payments']}"
        if "smtp" in self.names:
            addresses["SMTP_URL"] = f"smtp://{HOST}:{self.reached['smtp']}"
        environment = defaults | dict(self.user_environment) | addresses
        # These would win over the addresses of this cluster: it would migrate and seed somebody's real database.
        for stronger, server in (("SHARDS", "primary"), ("REDIS_BROKER_URL", "redis")):
            if server in self.names and stronger not in addresses:
                environment.pop(stronger, None)
        # Containers like to set this; without compiled modules each of our processes needs twice the CPU to start.
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        return environment

    def _shards(self) -> list[dict[str, Any]]:
        """All shards as the setting SHARDS says them, each with an equal part of the logical shards at first."""
        databases = [Name.of(name) for name in self.names if kind_of(name) in {"primary", "replica"}]
        count = 1 + max(name.shard for name in databases)
        cuts = [LOGICAL_SHARDS * shard // count for shard in range(count + 1)]
        found = replace(self.databases, ports=self.reached)
        return [
            {
                "primary": found.of_shard(shard).address_of_primary("scaleout"),
                "replicas": [
                    found.address(name, "scaleout") for name in self.names if Name.of(name)[:2] == (shard, "replica")
                ],
                "first": cuts[shard],
                "last": cuts[shard + 1] - 1,
            }
            for shard in range(count)
        ]

    def program(self, name: str) -> Program:
        """The process `name`."""
        kind = kind_of(name)
        made = {
            "nginx": self._nginx,
            "primary": self._database,
            "replica": self._database,
            "redis": self._redis,
            "payments": self._stand_in,
            "smtp": self._stand_in,
            "switchboard": self._switchboard,
        }.get(kind, self._ours)(name)
        databases = dict.fromkeys(("primary", "replica"), self.databases.stop_signal)
        stop_signal = (STOP_SIGNALS | databases).get(kind, "SIGTERM")
        return Program(
            name=name,
            kind=kind,
            log=str(self.layout.logs / f"{name}.log"),
            order=TIERS[kind],
            stop_signal=stop_signal,
            down_signal=DOWN_SIGNALS.get(kind, stop_signal),
            **made,
        )

    def _nginx(self, name: str) -> dict[str, Any]:
        port = self.ports[name]
        upstream = [self.reached[other] for other in self.names if kind_of(other) == "api"]
        configuration = nginx.prepare(self.layout, port, upstream, self.databases.tools.account)
        address = f"http://{HOST}:{port}"
        arguments = [str(self.binaries.nginx), "-p", str(self.layout.nginx), "-e", "stderr", "-c", configuration.name]
        return {"arguments": arguments, "port": port, "address": address, "health": f"{address}/health/ready"}

    def _database(self, name: str) -> dict[str, Any]:
        return self._server(name, self.databases.arguments(name), self.databases.address(name))

    def _redis(self, name: str) -> dict[str, Any]:
        settings = redis.prepare(self.layout, self.secrets, self.ports[name], self.databases.tools.account)
        return self._server(
            name, [str(self.binaries.redis), str(settings)], redis.address(self.secrets, self.ports[name])
        )

    def _server(self, name: str, arguments: list[str], address: str) -> dict[str, Any]:
        account = self.databases.tools.account
        return {
            "arguments": arguments,
            "folder": str(self.layout.data),
            "uid": account.uid if account else None,
            "port": self.ports[name],
            "address": address,
        }

    def _stand_in(self, name: str) -> dict[str, Any]:
        """The payment provider or the SMTP sink: both answer HTTP, the sink speaks SMTP on a port of its own too."""
        port = self.ports[name]
        module = {"payments": "deploy.local.payments", "smtp": "deploy.local.smtp_sink"}[name]
        arguments = [sys.executable, "-m", module, "--host", HOST, "--port", str(port)]
        http_address = f"http://{HOST}:{port}"
        if name == "smtp":
            http_address = f"http://{HOST}:{self.ports['smtp-http']}"
            arguments += ["--http-port", str(self.ports["smtp-http"])]
        data = self.layout.root / name
        data.mkdir(mode=0o700, exist_ok=True)
        return {
            "arguments": [*arguments, "--data", str(data)],
            "port": port,
            "address": f"smtp://{HOST}:{port}" if name == "smtp" else http_address,
            "http_address": http_address if name == "smtp" else None,
            "health": f"{http_address}/health/live",
            "environment": {"PATH": os.environ.get("PATH", os.defpath)},
        }

    def _switchboard(self, name: str) -> dict[str, Any]:
        port = self.ports[name]
        address = f"http://{HOST}:{port}"
        module = "deploy.chaos.switchboard"
        return {
            "arguments": [sys.executable, "-m", module, "--port", str(port), "--data", str(self.layout.root)],
            "port": port,
            "address": address,
            "health": f"{address}/health/live",
            "environment": {
                "PATH": os.environ.get("PATH", os.defpath),
                "SWITCHBOARD_KEY": self.switchboard_key,
            },
        }

    def _ours(self, name: str) -> dict[str, Any]:
        kind = kind_of(name)
        environment = self.environment() | {"INSTANCE": name, "TMPDIR": str(self.layout.temporary)}
        arguments = [sys.executable, "-m", "app.cli", kind]
        if kind == "api":
            address = f"http://{HOST}:{self.ports[name]}"
            if "switchboard" in self.names:
                environment |= {
                    "CONSOLE_SWITCHBOARD": f"http://{HOST}:{self.ports['switchboard']}",
                    "CONSOLE_SWITCHBOARD_KEY": self.switchboard_key,
                }
            arguments += ["--host", HOST, "--port", str(self.ports[name])] + (["--reload"] if self.reload else [])
            more: dict[str, Any] = {"port": self.ports[name], "address": address, "health": f"{address}/health/ready"}
        else:
            environment |= {"READY_FILE": str(self.layout.ready / name)}
            more = {}
            if kind == "scheduler":
                environment["SCHEDULE_FILE"] = str(self.layout.root / "schedule")
            else:
                port = self.ports[name]
                environment["METRICS_PORT"] = str(port)
                more = {"port": port, "address": f"http://{HOST}:{port}/metrics"}
            if self.reload:
                arguments += ["--reload"]
        return {"arguments": arguments, "environment": environment, **more}


@dataclass(frozen=True, slots=True)
class Process:
    """A process as `cluster.json` shows it.

    `pid` is None while it is down; `state` is running, stopped, stopping or restarting; `restarts` counts its deaths.
    """

    name: str
    kind: str
    pid: int | None
    address: str | None
    log: str
    state: str
    restarts: int
    http_address: str | None = None


def processes(layout: Layout) -> list[Process]:
    """All processes of the running cluster of `layout`, as the supervisor last saw them.

    Raises:
        ClusterError: none runs.
    """
    try:
        listed = read_json(layout.cluster)["processes"]
    except FileNotFoundError as error:
        raise ClusterError(not_running(layout)) from error
    return [Process(**entry) for entry in listed]


def not_running(layout: Layout) -> str:
    """That no cluster runs there, in words."""
    return f"No cluster runs in {layout.root}. `make run` or `scaleout up` starts one."


def port_names(names: list[str]) -> list[str]:
    """Which ports the processes `names` need, NGINX's apart: `primary`, `api-1`, `smtp-http` and so on."""
    needed = [name for name in names if kind_of(name) not in {"nginx", "scheduler"}]
    return needed + (["smtp-http"] if "smtp" in names else [])
