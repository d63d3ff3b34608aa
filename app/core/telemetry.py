"""Logs and metrics of every process: each metric declared once, here, with its help and bounded labels.

Logs are one JSON object a line (readable ones on a terminal) and carry the request id of the work at hand, in the
API as in the worker. Neither logs nor labels ever hold an e-mail address, a token, a password or a card.
"""

import asyncio
import atexit
import logging
import platform
import sys
from datetime import UTC, datetime
from typing import Any

import structlog
from prometheus_client import Counter, Gauge, Histogram

from app.core import context, tracing, wire
from app.core.settings import ServiceSettings

# From 1 ms to 10 s in steps of at most 5/3: Prometheus knows of a quantile which bucket it is in, so p50, p95 and p99
# are at most that far from the truth. 100 ms, which the objective is about, is an edge.
LATENCY_BUCKETS = (
    *(0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075),
    *(0.01, 0.015, 0.02, 0.03, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 0.75),
    *(1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0),
)

# The mode of a gauge says what a worker tells of its children: of those that live the one that is worst off.
DATABASE_STATEMENTS = Counter(
    "database_statements_total", "Statements sent, by node and outcome.", ["shard", "node", "outcome"]
)
DATABASE_FALLBACKS = Counter(
    "database_primary_reads_total", "Reads that went to the primary, by reason.", ["shard", "reason"]
)
DATABASE_RETRIES = Counter(
    "database_read_retries_total", "Reads that were sent once more, as their node was lost under them.", ["shard"]
)
# Each process has pools of its own; told as often as a node is watched.
POOL_SIZE = Gauge(
    "database_pool_size", "Connections that a pool may have.", ["shard", "node", "pool"], multiprocess_mode="livesum"
)
POOL_IN_USE = Gauge(
    "database_pool_in_use", "Connections that are in use.", ["shard", "node", "pool"], multiprocess_mode="livesum"
)
POOL_WAITS = Counter(
    "database_pool_waits_total", "Statements and transactions that found no free connection.", ["shard", "node", "pool"]
)
POOL_TIMEOUTS = Counter(
    "database_pool_timeouts_total", "Those of them that were refused, as none became free.", ["shard", "node", "pool"]
)
REPLICA_LAG = Gauge(
    "replica_lag_seconds",
    "How far a replica's replay is behind, as last seen.",
    ["shard", "node"],
    multiprocess_mode="livemax",
)
REPLICA_HEALTHY = Gauge(
    "replica_healthy", "1 while a replica takes reads, else 0.", ["shard", "node"], multiprocess_mode="livemin"
)
CACHE_READS = Counter("cache_reads_total", "Cache reads by kind of value and what they found.", ["kind", "result"])
CACHE_LOADS = Counter("cache_loads_total", "Values loaded behind the cache, by kind.", ["kind"])
CACHE_EARLY = Counter("cache_early_loads_total", "Values loaded again before they expired, by kind.", ["kind"])
STAMPEDES_AVOIDED = Counter(
    "cache_stampedes_avoided_total",
    "Misses that loaded nothing, as somebody else was at it: in the same process, or on another instance.",
    ["kind", "where"],
)
CACHE_OWED = Gauge(
    "cache_owed",
    "Writes that Redis could not be told of and is told again until it takes them.",
    multiprocess_mode="livesum",
)
TALLIED = Counter(
    "tally_total",
    "What is counted behind the write: gathered in Redis, added to the database, or dropped while Redis was away.",
    ["tally", "stage"],
)
TALLY_WAITING = Gauge(
    "tally_keys_waiting",
    "Keys whose counts a process could not hand over to Redis yet.",
    ["tally"],
    multiprocess_mode="livesum",
)
NEAR_UNHEARD = Counter(
    "cache_push_unheard_total", "Writes that waited out the lease of an instance that did not drop its copy in time."
)
REDIS_FAILURES = Counter("redis_failures_total", "Calls to Redis that failed, by what they were for.", ["purpose"])
REQUESTS_SHED = Counter("requests_shed_total", "Requests refused because too many were there, by reason.", ["reason"])
RATE_LIMITED = Counter("rate_limited_total", "Requests refused by a rate limit, by policy.", ["policy"])
LIMITED_LOCALLY = Counter("rate_limit_local_total", "Requests that an instance counted for itself, without Redis.")
BREAKER_OPEN = Gauge(
    "breaker_open",
    "1 while the breaker of a dependency refuses calls, else 0.",
    ["dependency"],
    multiprocess_mode="livemax",
)
OUTBOUND_CALLS = Counter("outbound_calls_total", "Calls to dependencies, by outcome.", ["dependency", "outcome"])
OUTBOUND_RETRIES = Counter("outbound_retries_total", "Calls to dependencies that were tried again.", ["dependency"])
PAYMENT_DIFFERENCES = Gauge(
    "payment_differences",
    "Payments on which we and the provider differed when they were last compared.",
    multiprocess_mode="mostrecent",
)
OUTBOX_PUBLISHED = Counter("outbox_published_total", "Outbox messages handed to the broker, by event.", ["event"])
OUTBOX_WAITING = Gauge("outbox_messages_waiting", "Outbox messages that are not done, at most 100,000.", ["shard"])
OUTBOX_OLDEST = Gauge("outbox_oldest_message_seconds", "Age of the oldest message that is not done, or 0.", ["shard"])
QUEUE_LENGTH = Gauge("queue_length", "Messages that wait in a queue of the broker.", ["queue"])
QUEUE_OLDEST = Gauge("queue_oldest_message_seconds", "How long the oldest of them has waited there, or 0.", ["queue"])
DEAD_LETTERS_OPEN = Gauge("dead_letters_open", "Dead letters that nobody has replayed.", ["shard"])
TASKS = Counter("tasks_total", "Finished task runs by task and outcome.", ["task", "outcome"])
TASK_SECONDS = Histogram("task_duration_seconds", "Duration of task runs.", ["task"], buckets=LATENCY_BUCKETS)
DEAD_LETTERS = Counter("dead_letters_total", "Messages given up, by task.", ["task"])
EVENT_STREAMS = Gauge("event_streams", "Streams of server-sent events that are open.")
RECOMMENDATIONS = Counter("recommendations_total", "Recommendations by the source that answered.", ["source"])
TRACE_SPANS = Counter(
    "trace_spans_total",
    "Spans that the collector took (exported), refused (failed) or never saw (dropped).",
    ["outcome"],
)
BUSINESS_EVENTS = Counter(
    "business_events_total",
    "What the business counts: orders by step, sign-ups, sign-ins, avatars, invoices.",
    ["event", "status"],
)
# The currencies are those of the products, which administrators choose.
REVENUE = Counter(
    "business_revenue_minor_units_total", "What confirmed orders come to, before any is cancelled.", ["currency"]
)
BUILD_INFO = Gauge(
    "scaleout_build_info", "1; the labels say what runs.", ["release", "role", "python"], multiprocess_mode="max"
)


# Lines of requests are written together: one write for some dozens of them. A process that is killed loses those of
# this last moment, one that ends does not.
GATHER_SECONDS = 0.05
MOST_GATHERED = 500


class RequestLines:
    """The line of each finished request, in the shape of all other lines, without a logger's many steps."""

    def __init__(self, settings: ServiceSettings, role: str) -> None:
        self._who = {"instance": settings.instance, "role": role, "level": "info", "logger": "app.request"}
        self._gathered: list[bytes] = []
        atexit.register(self.flush)

    def add(self, fields: dict[str, Any]) -> None:
        """Add one line; it is written within `GATHER_SECONDS`."""
        self._gathered.append(wire.encode({**fields, **self._who, "timestamp": datetime.now(UTC), "event": "request"}))
        if len(self._gathered) == 1:
            asyncio.get_running_loop().call_later(GATHER_SECONDS, self.flush)
        elif len(self._gathered) >= MOST_GATHERED:
            self.flush()

    def flush(self) -> None:
        """Write what is gathered."""
        if self._gathered:
            lines, self._gathered = self._gathered, []
            sys.stdout.write((b"\n".join(lines) + b"\n").decode())
            sys.stdout.flush()


# Set for the process by `configure_logging` where lines are JSON at level info or below.
_lines: list[RequestLines] = []


def request_finished(fields: dict[str, Any]) -> None:
    """Log one finished request: request id, caller, method, route, status and duration; its span learns them, too."""
    span = tracing.current()
    if span is not None:
        fields["trace_id"] = span.trace_id
        span.rename(f"{fields['method']} {fields['route']}")
        span.tell({_IN_TRACES[name]: value for name, value in fields.items() if name in _IN_TRACES})
    if _lines:
        _lines[0].add(fields)
    else:
        logger("app.request").info("request", **{name: str(value) for name, value in fields.items()})


# What of a request's line its span has, in OpenTelemetry's words where there are any. Not the caller.
_IN_TRACES = {
    "request_id": "scaleout.request_id",
    "method": "http.request.method",
    "route": "http.route",
    "status": "http.response.status_code",
}


def _work(_logger: Any, _name: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    work = context.current()
    if work.request_id != "-":
        event.setdefault("request_id", work.request_id)
    if work.profile_id is not None:
        event.setdefault("profile_id", str(work.profile_id))
    span = tracing.current()
    if span is not None:
        event.setdefault("trace_id", span.trace_id)
    return event


def configure_logging(settings: ServiceSettings, role: str) -> None:
    """Send every log line of this process, ours and the libraries', to standard output in one shape; say what it is."""
    BUILD_INFO.labels(settings.release, role, platform.python_version()).set(1)
    readable = settings.log_format == "console" or (settings.log_format == "auto" and sys.stdout.isatty())

    # Closed over rather than bound in a context: a server's tasks do not inherit what was bound at its start.
    def who(_logger: Any, _name: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        event.update(instance=settings.instance, region=settings.region, role=role)
        return event

    shared: list[structlog.typing.Processor] = [
        _work,
        who,
        structlog.processors.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    ending: list[structlog.typing.Processor] = (
        [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
        if readable
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    )
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.PositionalArgumentsFormatter(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *ending],
        )
    )
    logging.basicConfig(handlers=[handler], level=settings.log_level.upper(), force=True)
    logging.captureWarnings(capture=True)
    _lines[:] = [RequestLines(settings, role)] if not readable and settings.log_level in {"debug", "info"} else []
    for noisy in ("httpx", "httpcore", "uvicorn.access", "sqlalchemy.engine"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def logger(name: str) -> structlog.stdlib.BoundLogger:
    """Return the logger of a room, named by its module."""
    bound: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return bound
