"""Every setting of every process: read once from the environment, frozen, refused by name when bad.

The settings are nested by the room that they belong to; the environment stays flat (`DATABASE_URL`,
`RATE_LIMIT_FREE`), so that Compose, Kubernetes and a shell name them alike. A process that reads a bad value does not
start: `SettingsError` lists every bad variable at once, never its value where that is a secret.
"""

import os
import socket
from collections.abc import Mapping
from functools import cached_property
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_settings import NoDecode, SettingsConfigDict

from app.core.addresses import Deployment, RedisAddress
from app.core.ids import LOGICAL_SHARDS
from app.core.variables import BrokerUrl, DatabaseUrl, Group, Limit, Networks, OwnUrl, RedisUrl, Secret, Split, address

_MEBIBYTE = 1024 * 1024


class SettingsError(ValueError):
    """One line for each setting that is missing or bad, by the name of its environment variable."""


class ShardAddress(BaseModel):
    """One shard of `SHARDS`: a primary, its replicas, and the logical shards first..last that it holds at first.

    What it holds later is in the map of the catalog database. A shard that is added names no logical shards: it holds
    nothing until some are moved to it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    primary: DatabaseUrl = Field(repr=False)
    replicas: tuple[DatabaseUrl, ...] = Field(default=(), repr=False)
    first: int | None = Field(default=None, ge=0, lt=LOGICAL_SHARDS)
    last: int | None = Field(default=None, ge=0, lt=LOGICAL_SHARDS)

    @property
    def held(self) -> tuple[int, int] | None:
        """The first and last logical shard, or None if it holds nothing at first."""
        return None if self.first is None or self.last is None else (self.first, self.last)

    @model_validator(mode="after")
    def _has_both_ends(self) -> Self:
        if (self.first is None) is not (self.last is None):
            raise ValueError("names one of first and last; name both, or none for a shard that holds nothing yet")
        return self


class ServiceSettings(Group):
    """Who this process is and how it meets the world."""

    instance: str = Field(default_factory=socket.gethostname, pattern=r"^[A-Za-z0-9._-]{1,64}$")
    region: str = Field(default="local", pattern=r"^[a-z0-9-]{1,32}$")
    release: str = Field(default="dev", pattern=r"^[A-Za-z0-9._-]{1,64}$")  # which code this is, for metrics and traces
    public_url: Annotated[str, address("http", "https")] = "http://127.0.0.1:8000"
    secret_key: Secret
    log_format: Literal["auto", "json", "console"] = "auto"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    trusted_proxies: Networks = ()
    admin_allow: Networks = (ip_network("127.0.0.0/8"), ip_network("::1/128"))
    request_deadline: float = Field(default=10.0, gt=0, le=120)  # seconds, API.md
    body_limit: int = Field(default=100_000, ge=1_000, le=10 * _MEBIBYTE)  # bytes, API.md: 100 KB
    # Requests at a time: what the pools of the nodes can carry at once, and some that wait for Redis. The queue is for
    # bursts; who would stand in it for over 40 ms is refused.
    requests_at_once: int = Field(default=48, ge=1, le=10_000)
    requests_waiting: int = Field(default=96, ge=0, le=100_000)
    drain_seconds: float = Field(default=5.0, ge=0, le=300)  # served on after SIGTERM, for balancers to notice
    ready_file: Path | None = None
    schedule_file: Path = Path("celerybeat-schedule")
    metrics_port: int | None = Field(default=None, ge=1, le=65535)  # of relays and workers, which have no other port

    @property
    def secret(self) -> bytes:
        """The secret that signs cursors and tokens and keys the e-mail directory."""
        return self.secret_key.get_secret_value().encode()


_NO_DATABASE = "DATABASE_URL: is missing (postgresql://user:password@host:5432/name or mariadb://…)"


class DatabaseSettings(Group):
    """Where the shards are and how long anything on them may take. Times are seconds."""

    model_config = SettingsConfigDict(env_prefix="DATABASE_", populate_by_name=True)

    url: DatabaseUrl | None = Field(default=None, repr=False)
    replica_urls: Annotated[tuple[DatabaseUrl, ...], NoDecode, Split] = Field(
        default=(), validation_alias="REPLICA_URLS", repr=False
    )
    shard_list: tuple[ShardAddress, ...] = Field(default=(), validation_alias="SHARDS", repr=False)
    cores: int = Field(default=2, ge=1, le=512)
    spindles: int = Field(default=1, ge=0, le=64)
    pool_size: int | None = Field(default=None, ge=1, le=200)
    spread: Literal["none", "citus"] = "none"  # whether Citus spreads the tables of each shard over its nodes
    pooler: Literal["none", "transaction"] = "none"  # whether PgBouncer stands before the servers, and in which mode
    # Together under a second, so that a write is refused within one if the primary hangs.
    pool_timeout: float = Field(default=0.8, gt=0, le=30)
    connect_timeout: float = Field(default=0.8, gt=0, le=30)
    watch_timeout: float = Field(default=0.6, gt=0, le=30)
    command_timeout: float = Field(default=5.0, gt=0, le=60)
    replica_poll: float = Field(default=0.2, gt=0, le=10)
    replica_max_lag: float = Field(default=10.0, gt=0, le=300)
    primary_read_cap: int = Field(default=8, ge=1, le=1000)

    @property
    def connections(self) -> int:
        """The size of a pool: PostgreSQL's own starting point, cores x 2 + spindles of the server, unless set."""
        return self.pool_size or self.cores * 2 + self.spindles

    @property
    def is_named(self) -> bool:
        """Whether any database is."""
        return bool(self.shard_list) or self.url is not None

    @cached_property
    def shards(self) -> tuple[ShardAddress, ...]:
        """`SHARDS`, or the one shard of `DATABASE_URL` and `REPLICA_URLS`."""
        if self.shard_list:
            return self.shard_list
        if self.url is None:
            raise SettingsError(_NO_DATABASE)
        return (ShardAddress(primary=self.url, replicas=self.replica_urls, first=0, last=LOGICAL_SHARDS - 1),)


class RedisSettings(Group):
    """Sessions, cache, limits, locks and the broker; the cache and the broker may be servers of their own."""

    model_config = SettingsConfigDict(env_prefix="REDIS_")

    url: RedisUrl
    cache_url: RedisUrl | None = None
    broker_url: BrokerUrl | None = None
    timeout: float = Field(default=0.25, gt=0, le=10)  # seconds; a cache that answers later is not worth waiting for
    connections: int = Field(default=64, ge=1, le=10_000)

    @property
    def address(self) -> RedisAddress:
        """Where sessions, limits, positions, locks and pushes are."""
        return RedisAddress.parse(self.url.get_secret_value())

    @property
    def cache_address(self) -> RedisAddress:
        """Where cached values are."""
        return RedisAddress.parse((self.cache_url or self.url).get_secret_value())

    @property
    def broker(self) -> str:
        """The URL of Celery's broker."""
        return (self.broker_url or self.url).get_secret_value()


class CacheSettings(Group):
    """What an instance keeps in its own memory of the cache and of sessions."""

    model_config = SettingsConfigDict(env_prefix="CACHE_")

    # A profile is about half a kilobyte, a page of a list about ten: 20 MB for most shops. 0 keeps nothing.
    local_entries: int = Field(default=10_000, ge=0, le=1_000_000)


class StorageSettings(Group):
    """Object storage for invoices and assets."""

    model_config = SettingsConfigDict(env_prefix="STORAGE_")

    url: Annotated[str, address("s3", "gs", "az", "file")]
    link_seconds: int = Field(default=300, ge=10, le=7 * 24 * 3600)
    # Where clients reach the bucket, if not at its own address: https://shop.example/storage. Signed links lead there.
    outside_url: Annotated[str, address("http", "https")] | None = None
    # The CDN in front of the bucket, for its public objects: https://{region}.cdn.example.com, which REGION fills in.
    public_url: Annotated[str, address("http", "https")] | None = None


class PaymentSettings(Group):
    """The payment provider. The timeout is above its slowest honest answer, 5 s."""

    model_config = SettingsConfigDict(env_prefix="PAYMENT_")

    url: Annotated[str, address("http", "https")]
    timeout: float = Field(default=8.0, gt=0, le=60)


class MailSettings(Group):
    """The mail server. Times are seconds."""

    model_config = SettingsConfigDict(env_prefix="SMTP_")

    url: Annotated[str, address("smtp", "smtps")] = Field(repr=False)
    sender: str = "Northwind & Pine <orders@northwind-pine.example>"
    timeout: float = Field(default=10.0, gt=0, le=120)


class RateSettings(Group):
    """Requests in a period: by address for strangers and sign-in, by profile for each tier."""

    model_config = SettingsConfigDict(env_prefix="RATE_LIMIT_")

    anonymous: Limit = "100/minute"
    free: Limit = "100/hour"
    pro: Limit = "1000/hour"
    enterprise: Limit = "10000/hour"
    sign_in: Limit = "10/minute"
    instances: int = Field(default=2, ge=1, le=10_000)  # instances that share a limit while Redis is down


class SessionSettings(Group):
    """How long a session lives, and what a password hash costs (OWASP: Argon2id, 19 MiB, 2 passes, 1 lane)."""

    model_config = SettingsConfigDict(env_prefix="SESSION_")

    idle: int = Field(default=3600, ge=60, le=30 * 24 * 3600)  # seconds
    absolute: int = Field(default=30 * 24 * 3600, ge=60)  # seconds
    # Of one profile: more than anybody has devices, few enough to list and to end in one statement.
    most: int = Field(default=50, ge=1, le=1000)
    hash_memory: int = Field(default=19_456, ge=8, le=1_048_576)  # KiB
    hash_passes: int = Field(default=2, ge=1, le=20)
    hash_threads: int = Field(default=2, ge=1, le=64)  # hashes at a time in one process; each takes hash_memory
    hash_queue: int = Field(default=16, ge=0, le=1000)  # hashes that may wait; past that: 503


class EventSettings(Group):
    """Streams of server-sent events: how long one lasts, and how many an instance and each of its callers may have."""

    model_config = SettingsConfigDict(env_prefix="EVENTS_")

    seconds: float = Field(default=540, gt=0, le=600)  # a client connects anew after that; API.md: within 10 min
    # An open stream costs about 30 KB and a read every 15 s; a thousand leave an instance free for everything else.
    streams: int = Field(default=1000, ge=1, le=100_000)
    streams_per_caller: int = Field(default=10, ge=1, le=1000)  # as many tabs of one person on one instance


class ConsoleSettings(Group):
    """The live console. Off, there is no page, and no process tells of itself.

    The switchboard breaks and mends the processes of a local cluster; only there are its address and key given.
    """

    model_config = SettingsConfigDict(env_prefix="CONSOLE_")

    enabled: bool = True
    switchboard: OwnUrl | None = None
    switchboard_key: SecretStr | None = None


class WorkerSettings(Group):
    """Relay and workers. Times are seconds."""

    model_config = SettingsConfigDict(env_prefix="WORKER_")

    concurrency: int = Field(default=2, ge=1, le=64)
    visibility_timeout: int = Field(default=300, ge=30)
    relay_batch: int = Field(default=100, ge=1, le=1000)
    relay_poll: float = Field(default=0.05, gt=0, le=10)
    stale_after: float = Field(default=60.0, ge=5)
    max_tries: int = Field(default=12, ge=1)


class TraceSettings(Group):
    """Whether requests are traced, how many of them, and where their traces go (OpenTelemetry, OTLP over HTTP)."""

    model_config = SettingsConfigDict(env_prefix="TRACE_", populate_by_name=True)

    # The address of a collector without its path: http://collector:4318. None: nothing is traced at all.
    endpoint: Annotated[str, address("http", "https")] | None = Field(
        default=None, validation_alias="OTEL_EXPORTER_OTLP_ENDPOINT", repr=False
    )
    headers: SecretStr | None = Field(default=None, validation_alias="OTEL_EXPORTER_OTLP_HEADERS")  # name=value,…
    sample: float = Field(default=0.01, ge=0, le=1)  # the share of requests that are traced
    # Callers whose own decision about sampling is followed; a stranger's could make us trace everything.
    trust: Networks = ()


class Settings(BaseModel):
    """All of it. Build one with `load_settings`, or by hand in a test."""

    model_config = ConfigDict(frozen=True)

    service: ServiceSettings
    database: DatabaseSettings
    redis: RedisSettings
    cache: CacheSettings
    storage: StorageSettings
    payments: PaymentSettings
    mail: MailSettings
    rates: RateSettings
    sessions: SessionSettings
    events: EventSettings
    console: ConsoleSettings
    workers: WorkerSettings
    traces: TraceSettings

    groups: ClassVar[dict[str, type[Group]]] = {
        "service": ServiceSettings,
        "database": DatabaseSettings,
        "redis": RedisSettings,
        "cache": CacheSettings,
        "storage": StorageSettings,
        "payments": PaymentSettings,
        "mail": MailSettings,
        "rates": RateSettings,
        "sessions": SessionSettings,
        "events": EventSettings,
        "console": ConsoleSettings,
        "workers": WorkerSettings,
        "traces": TraceSettings,
    }


def load_settings(environment: Mapping[str, str] = os.environ) -> Settings:
    """Read the settings from an environment, this process's own unless given.

    Raises:
        SettingsError: naming every missing or bad variable, one a line.
    """
    found: dict[str, Group] = {}
    problems: list[str] = []
    for name, group in Settings.groups.items():
        try:
            found[name] = group.read(environment)
        except ValidationError as error:
            problems += [_describe(group, problem) for problem in error.errors(include_url=False, include_input=False)]
        except ValueError as error:  # pydantic-settings could not read a JSON value
            problems.append(f"SHARDS: {error.__cause__ or error}" if group is DatabaseSettings else str(error))
    database = found.get("database")
    if isinstance(database, DatabaseSettings) and not database.is_named:
        problems.append(_NO_DATABASE)
    if not problems:
        problems += _contradictions(found)
    if problems:
        raise SettingsError("\n".join(problems))
    return Settings.model_validate(found)


def _describe(group: type[Group], problem: Any) -> str:
    field, *path = problem["loc"]
    prefix = group.model_config.get("env_prefix", "")
    names = {info.validation_alias or f"{prefix}{name}".upper() for name, info in group.model_fields.items()}
    known = {name.upper(): name for name in names if isinstance(name, str)}
    variable = known.get(str(field).upper()) or f"{prefix}{field}".upper()
    where = "".join(f"[{step}]" for step in path)
    message = "is missing" if problem["type"] == "missing" else problem["msg"].removeprefix("Value error, ")
    return f"{variable}{where}: {message[0].lower()}{message[1:]}"


def _contradictions(found: dict[str, Any]) -> list[str]:
    database: DatabaseSettings = found["database"]
    problems = []
    held = sorted(shard.held for shard in database.shards if shard.held)
    urls = [url for shard in database.shards for url in (shard.primary, *shard.replicas)]
    if len({url.startswith("postgresql:") for url in urls}) > 1:
        name = "SHARDS" if database.shard_list else "REPLICA_URLS"
        problems.append(f"{name}: names servers of two engines; all must be PostgreSQL, or all MariaDB")
    if database.spread == "citus" and (database.shard_list or not urls[0].startswith("postgresql:")):
        problems.append("DATABASE_SPREAD: Citus spreads one PostgreSQL database itself; leave SHARDS out")
    redis: RedisSettings = found["redis"]
    if redis.broker_url is None and redis.address.deployment is not Deployment.SERVER:
        problems.append("REDIS_BROKER_URL: is missing: the broker must be one server, redis://, when REDIS_URL is not")
    expected = 0
    for first, last in held:
        if first != expected or last < first:
            problems.append(f"SHARDS: logical shard {expected} must be held by exactly one shard, 0 to 1023 in all")
            break
        expected = last + 1
    else:
        if expected != LOGICAL_SHARDS:
            problems.append(f"SHARDS: nobody holds the logical shards from {expected} to {LOGICAL_SHARDS - 1}")
    return problems


def environment_names() -> frozenset[str]:
    """Return the name of every variable that `load_settings` reads, for whoever passes an environment on."""
    names = set()
    for group in Settings.groups.values():
        prefix = group.model_config.get("env_prefix", "")
        for name, info in group.model_fields.items():
            names.add(info.validation_alias if isinstance(info.validation_alias, str) else f"{prefix}{name}".upper())
    return frozenset(names)
