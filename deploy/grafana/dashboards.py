"""The dashboards: what is drawn of which question to Prometheus, one row for each thing that one looks for.

`python -m deploy.grafana` writes them beside this file. A metric that no process tells, or a rule that is not there,
fails a test.
"""

from typing import NamedTuple


class Question(NamedTuple):
    """What is asked of Prometheus, and how its answers are called."""

    expression: str
    legend: str = ""


class Panel(NamedTuple):
    """One drawing."""

    title: str
    unit: str
    questions: tuple[Question, ...]
    help: str = ""


class Row(NamedTuple):
    """Panels that answer one question of a person's."""

    title: str
    panels: tuple[Panel, ...]


def _by(metric: str, labels: str, legend: str, *, window: str = "5m") -> tuple[Question, ...]:
    """Ask how much of a counter there is in a second, by some of its labels."""
    return (Question(f"sum by ({labels}) (rate({metric}[{window}]))", legend),)


def _quantiles(metric: str, matched: str = "") -> tuple[Question, ...]:
    """Ask for the three quantiles of a histogram of all instances together."""
    return tuple(
        Question(f"histogram_quantile({share}, sum by (le) (rate({metric}_bucket{matched}[5m])))", name)
        for share, name in ((0.5, "p50"), (0.95, "p95"), (0.99, "p99"))
    )


DASHBOARDS: dict[str, tuple[str, tuple[Row, ...]]] = {
    "overview": (
        "what customers get: rate, errors, duration, and how full it is",
        (
            Row(
                "Objectives",
                (
                    Panel(
                        "Requests that failed, against the 0.01 % allowed",
                        "percentunit",
                        (Question("slo:failed:ratio5m", "5 minutes"), Question("slo:failed:ratio1h", "1 hour")),
                    ),
                    Panel(
                        "Requests over 100 ms, against the 5 % allowed",
                        "percentunit",
                        (Question("slo:slow:ratio5m", "5 minutes"), Question("slo:slow:ratio1h", "1 hour")),
                    ),
                    Panel(
                        "Left of the month's allowance",
                        "percentunit",
                        (Question("slo:failed:left30d", "errors"), Question("slo:slow:left30d", "slowness")),
                        "1 is all of it, 0 is none; what Prometheus has of the last 30 days.",
                    ),
                ),
            ),
            Row(
                "Rate, errors, duration",
                (
                    Panel("Requests by status", "reqps", (Question("service:requests:rate5m", "{{status}}"),)),
                    Panel("Duration", "s", _quantiles("http_request_duration_highr_seconds")),
                    Panel("p95 by route", "s", (Question("route:duration:p95_5m", "{{method}} {{handler}}"),)),
                ),
            ),
            Row(
                "Saturation",
                (
                    Panel(
                        "In flight and waiting",
                        "short",
                        (
                            Question("sum by (instance) (http_requests_in_flight)", "{{instance}} in flight"),
                            Question("sum by (instance) (http_requests_waiting)", "{{instance}} waiting"),
                        ),
                    ),
                    Panel(
                        "Refused, as too many were there", "reqps", _by("requests_shed_total", "reason", "{{reason}}")
                    ),
                    Panel("Refused by a limit", "reqps", _by("rate_limited_total", "policy", "{{policy}}")),
                ),
            ),
            Row(
                "Dependencies",
                (
                    Panel(
                        "Open breakers", "short", (Question("max by (dependency) (breaker_open)", "{{dependency}}"),)
                    ),
                    Panel(
                        "Calls by outcome",
                        "ops",
                        _by("outbound_calls_total", "dependency, outcome", "{{dependency}} {{outcome}}"),
                    ),
                    Panel("Tried again", "ops", _by("outbound_retries_total", "dependency", "{{dependency}}")),
                ),
            ),
        ),
    ),
    "data": (
        "databases: which node answers, how far replicas are behind, how full pools are",
        (
            Row(
                "Statements",
                (
                    Panel(
                        "By node", "ops", _by("database_statements_total", "shard, node", "shard {{shard}} {{node}}")
                    ),
                    Panel(
                        "That failed",
                        "ops",
                        _by('database_statements_total{outcome!="ok"}', "shard, node", "shard {{shard}} {{node}}"),
                    ),
                    Panel(
                        "Reads on the primary, and why",
                        "ops",
                        _by("database_primary_reads_total", "shard, reason", "shard {{shard}} {{reason}}"),
                    ),
                ),
            ),
            Row(
                "Replicas",
                (
                    Panel(
                        "Lag",
                        "s",
                        (Question("max by (shard, node) (replica_lag_seconds)", "shard {{shard}} {{node}}"),),
                    ),
                    Panel(
                        "Takes reads",
                        "short",
                        (Question("min by (shard, node) (replica_healthy)", "shard {{shard}} {{node}}"),),
                    ),
                    Panel(
                        "Reads sent once more",
                        "ops",
                        _by("database_read_retries_total", "shard", "shard {{shard}}"),
                    ),
                ),
            ),
            Row(
                "Pools",
                (
                    Panel(
                        "Fullest pool of any process",
                        "percentunit",
                        (Question("database:pool:used_ratio", "shard {{shard}} {{node}} {{pool}}"),),
                    ),
                    Panel(
                        "Waited for a connection",
                        "ops",
                        _by("database_pool_waits_total", "shard, node, pool", "shard {{shard}} {{node}} {{pool}}"),
                    ),
                    Panel(
                        "Refused, as none became free",
                        "ops",
                        _by("database_pool_timeouts_total", "shard, node, pool", "shard {{shard}} {{node}} {{pool}}"),
                    ),
                ),
            ),
        ),
    ),
    "cache": (
        "cache: what reads find, what is loaded, what was spared",
        (
            Row(
                "Reads",
                (
                    Panel("Hit rate", "percentunit", (Question("cache:hits:ratio5m", "{{kind}}"),)),
                    Panel("By what they found", "ops", _by("cache_reads_total", "result", "{{result}}")),
                    Panel("By kind", "ops", _by("cache_reads_total", "kind", "{{kind}}")),
                ),
            ),
            Row(
                "Loads",
                (
                    Panel("Loaded", "ops", _by("cache_loads_total", "kind", "{{kind}}")),
                    Panel("Loaded before they expired", "ops", _by("cache_early_loads_total", "kind", "{{kind}}")),
                    Panel(
                        "Stampedes avoided",
                        "ops",
                        _by("cache_stampedes_avoided_total", "kind, where", "{{kind}}, same {{where}}"),
                    ),
                ),
            ),
            Row(
                "Redis",
                (
                    Panel("Calls that failed", "ops", _by("redis_failures_total", "purpose", "{{purpose}}")),
                    Panel("Writes that are owed to it", "short", (Question("sum(cache_owed)", "owed"),)),
                    Panel(
                        "Copies not dropped in time",
                        "ops",
                        (Question("sum(rate(cache_push_unheard_total[5m]))", "leases waited out"),),
                    ),
                ),
            ),
        ),
    ),
    "orders": (
        "orders: how they end, what they come to, and what waits on the way",
        (
            Row(
                "Business",
                (
                    Panel(
                        "Orders by step",
                        "ops",
                        _by('business_events_total{event="order"}', "status", "{{status}}"),
                    ),
                    Panel(
                        "Revenue of the last hour, in minor units",
                        "short",
                        (
                            Question(
                                "sum by (currency) (increase(business_revenue_minor_units_total[1h]))", "{{currency}}"
                            ),
                        ),
                    ),
                    Panel(
                        "Everything else that is counted",
                        "ops",
                        _by('business_events_total{event!="order"}', "event, status", "{{event}} {{status}}"),
                    ),
                ),
            ),
            Row(
                "Outbox and queues",
                (
                    Panel(
                        "Waiting",
                        "short",
                        (
                            Question("max by (shard) (outbox_messages_waiting)", "outbox {{shard}}"),
                            Question("max by (queue) (queue_length)", "queue {{queue}}"),
                        ),
                    ),
                    Panel(
                        "Age of the oldest",
                        "s",
                        (
                            Question("max by (shard) (outbox_oldest_message_seconds)", "outbox {{shard}}"),
                            Question("max by (queue) (queue_oldest_message_seconds)", "queue {{queue}}"),
                        ),
                    ),
                    Panel("Relayed", "ops", _by("outbox_published_total", "event", "{{event}}")),
                ),
            ),
            Row(
                "Tasks",
                (
                    Panel("By outcome", "ops", _by("tasks_total", "outcome", "{{outcome}}")),
                    Panel(
                        "p95 by task",
                        "s",
                        (
                            Question(
                                "histogram_quantile(0.95, sum by (le, task) (rate(task_duration_seconds_bucket[5m])))",
                                "{{task}}",
                            ),
                        ),
                    ),
                    Panel(
                        "Dead letters",
                        "short",
                        (
                            Question("max by (shard) (dead_letters_open)", "open, shard {{shard}}"),
                            Question("sum by (task) (increase(dead_letters_total[1h]))", "last hour, {{task}}"),
                        ),
                    ),
                ),
            ),
        ),
    ),
    "capacity": (
        "capacity: what a further instance, worker or connection would help",
        (
            Row(
                "Instances",
                (
                    Panel(
                        "Processes by release",
                        "short",
                        (Question("count by (role, release) (scaleout_build_info)", "{{role}} {{release}}"),),
                    ),
                    Panel(
                        "CPU by process",
                        "percentunit",
                        (Question("sum by (instance) (rate(process_cpu_seconds_total[5m]))", "{{instance}}"),),
                        "1 is one core, which is all that an instance can use.",
                    ),
                    Panel(
                        "Memory by process",
                        "bytes",
                        (Question("sum by (instance) (process_resident_memory_bytes)", "{{instance}}"),),
                    ),
                ),
            ),
            Row(
                "What fills up first",
                (
                    Panel("Requests by instance", "reqps", _by("http_requests_total", "instance", "{{instance}}")),
                    Panel(
                        "Tasks of the event loop",
                        "short",
                        (Question("sum by (instance) (asyncio_tasks)", "{{instance}}"),),
                    ),
                    Panel(
                        "Connections of the databases in use",
                        "short",
                        (
                            Question(
                                "sum by (shard, node, pool) (database_pool_in_use)", "shard {{shard}} {{node}} {{pool}}"
                            ),
                        ),
                    ),
                ),
            ),
            Row(
                "Streams, counts and traces",
                (
                    Panel(
                        "Open streams of events",
                        "short",
                        (Question("sum by (instance) (event_streams)", "{{instance}}"),),
                    ),
                    Panel("Counted behind the write", "ops", _by("tally_total", "tally, stage", "{{tally}} {{stage}}")),
                    Panel("Spans", "ops", _by("trace_spans_total", "outcome", "{{outcome}}")),
                ),
            ),
        ),
    ),
}
