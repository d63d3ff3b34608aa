"""Who decides that a request is traced, and what tracing costs where nobody does: nothing is made or imported."""

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import settings_from
from prometheus_client import REGISTRY
from starlette.types import Message, Receive, Scope, Send

from app.api.traces import Traced
from app.core import otlp, tracing
from app.core.settings import Settings
from app.core.tracing import Kind

TRACE = "0af7651916cd43dd8448eb211c80319c"
SPAN = "b7ad6b7169203331"


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a collector that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def settings_of(endpoint: str, **more: str) -> Settings:
    """Settings of an instance that exports there."""
    return settings_from(
        {
            "DATABASE_URL": "postgresql://nobody@127.0.0.1/nothing",
            "REDIS_URL": "redis://127.0.0.1:1/0",
            "STORAGE_URL": "file:///tmp",
            "PAYMENT_URL": "http://127.0.0.1:1",
            "SMTP_URL": "smtp://127.0.0.1:1",
            "SECRET_KEY": "k" * 64,
            "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
            **more,
        }
    )


async def span_of(settings: Settings, traceparent: str | None, peer: str = "198.51.100.7") -> tracing.Span | None:
    """Send a request through the edge of traces; return the span that its handler has at hand."""
    found: list[tracing.Span | None] = []

    async def handler(_scope: Scope, _receive: Receive, send: Send) -> None:
        found.append(tracing.current())
        await send({"type": "http.response.start", "status": 204, "headers": []})

    async def nothing(_message: Message) -> None:
        return

    async def never() -> Message:
        raise AssertionError("nobody reads")

    headers = [] if traceparent is None else [(b"traceparent", traceparent.encode())]
    scope = {"type": "http", "path": "/api/v1/products", "headers": headers, "client": (peer, 1)}
    await Traced(handler, settings)(scope, never, nothing)
    return found[0]


def dropped() -> float:
    return REGISTRY.get_sample_value("trace_spans_total", {"outcome": "dropped"}) or 0.0


@pytest.mark.sabotage(
    "app/core/telemetry.py",
    "from app.core import context, tracing, wire",
    "from app.core import context, tracing, wire; import opentelemetry.exporter.otlp.proto.http",
)
def test_where_no_collector_is_named_not_even_the_exporter_is_imported() -> None:
    script = (
        "import sys, app.main, workers.main, workers.relay; "
        # redis-py imports the SDK's metrics for itself, wherever they are installed.
        "found = [each for each in sys.modules if each.startswith(('opentelemetry.exporter', 'app.core.otlp'))]; "
        "sys.exit(' '.join(found))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)  # noqa: S603
    assert done.stderr.strip() == ""


@pytest.mark.sabotage("app/api/traces.py", "self._trusted or random.random() < self._share", "True")
async def test_what_is_not_sampled_makes_no_span(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(silent, TRACE_SAMPLE="0")

    def refuse(*_: Any) -> None:
        raise AssertionError("a span was made")

    monkeypatch.setattr(otlp.Recorder, "start", refuse)
    with tracing.exporting(settings, "api"):
        assert await span_of(settings, f"00-{TRACE}-{SPAN}-01") is None


@pytest.mark.sabotage("app/api/traces.py", "return parent.sampled", "return True")
async def test_only_trusted_callers_decide_about_sampling_and_both_ways(silent: str) -> None:
    for share, stranger_is_traced in (("0", False), ("1", True)):
        settings = settings_of(silent, TRACE_SAMPLE=share, TRACE_TRUST="192.0.2.0/24")
        with tracing.exporting(settings, "api"):
            for flag in ("00", "01"):
                assert (await span_of(settings, f"00-{TRACE}-{SPAN}-{flag}") is not None) is stranger_is_traced
                trusted = await span_of(settings, f"00-{TRACE}-{SPAN}-{flag}", peer="192.0.2.9")
                assert (trusted is not None) is (flag == "01")
            # Whoever has decided nothing is drawn for, as anybody.
            assert (await span_of(settings, None, peer="192.0.2.9") is not None) is stranger_is_traced


async def test_a_traced_request_goes_on_with_the_callers_trace(silent: str) -> None:
    settings = settings_of(silent, TRACE_SAMPLE="1")
    with tracing.exporting(settings, "api"):
        span = await span_of(settings, f"00-{TRACE}-{SPAN}-00")
        assert span is not None
        assert span.traceparent.startswith(f"00-{TRACE}-")
        assert SPAN not in span.traceparent


@pytest.mark.parametrize(
    "given",
    [
        *(None, "", "x", f"00-{TRACE}-{SPAN}", f"01-{TRACE}-{SPAN}-01", f"00-{TRACE.upper()}-{SPAN}-01"),
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01-more",
        f"00-{TRACE}-{SPAN}-01\n",
    ],
)
def test_what_is_no_traceparent_is_none(given: str | None) -> None:
    assert tracing.parent_of(given) is None


async def test_work_that_outlives_its_request_adds_nothing_to_the_trace(silent: str) -> None:
    settings = settings_of(silent)
    goes_on = asyncio.Event()

    async def later() -> tracing.Span | None:
        await goes_on.wait()
        return tracing.leaf("redis")

    with tracing.exporting(settings, "api"):
        with tracing.within(tracing.start("request", Kind.SERVER, None)):
            task = asyncio.create_task(later())
        goes_on.set()
        assert await task is None


@pytest.mark.sabotage("app/core/otlp.py", "if len(self._waiting) >= MOST_WAITING:", "if False:")
def test_a_collector_that_hangs_costs_a_bounded_queue_and_little_time_at_the_end(
    silent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(otlp, "MOST_WAITING", 100)
    monkeypatch.setattr(otlp, "BATCH", 10)
    monkeypatch.setattr(otlp, "FLUSH_SECONDS", 0.2)
    before = dropped()
    began = time.monotonic()
    with tracing.exporting(settings_of(silent), "api"):
        for _ in range(1000):
            span = tracing.start("request", Kind.SERVER, None)
            assert span is not None
            span.end()
        # One batch at most is with the exporter, and what is in the queue waits for it.
        assert dropped() - before >= 1000 - 100 - 10
        took = time.monotonic() - began
    assert took < otlp.EXPORT_SECONDS  # which waiting for one batch would have taken
    assert dropped() - before >= 1000 - 10
    assert time.monotonic() - began < 5
