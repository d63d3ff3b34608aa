"""Records spans with OpenTelemetry's SDK and hands them to a collector, in batches, on a thread beside the work.

Nobody waits for a collector. One that is slow or away costs a bounded queue: what does not fit is dropped and counted,
and a client notices nothing. Only `tracing.exporting` imports this room, because the SDK is not free to import.
"""

import logging
import threading
from collections import deque
from collections.abc import Mapping
from urllib.parse import unquote

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from app.core.settings import Settings, TraceSettings
from app.core.telemetry import TRACE_SPANS, logger
from app.core.tracing import Kind, Parent, Span, Value

log = logger(__name__)

# Finished spans that wait for the exporter: some 4 MB. A second of some hundred traced requests fits.
MOST_WAITING = 4096
# In one request to the collector; a few hundred kilobytes.
BATCH = 512
# Seconds until what has gathered leaves; somebody who looks for a trace has it before they have typed its id.
EVERY = 1.0
# Seconds for one batch, its repetitions included.
EXPORT_SECONDS = 5.0
# Seconds that the end of a process waits: far less than the 20 in which its requests finish.
FLUSH_SECONDS = 2.0
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)


class Recorder:
    """Makes the spans of one process.

    Args:
        settings: where the collector is, and who this process is.
        role: `api`, `relay` or `worker`.
    """

    failed = Status(StatusCode.ERROR)

    def __init__(self, settings: Settings, role: str) -> None:
        service = settings.service
        self._batches = _Batches(settings.traces)
        provider = TracerProvider(
            # Whether to sample was decided at the edge; what is not sampled never comes here.
            sampler=ALWAYS_ON,
            resource=Resource(
                {
                    "service.namespace": "scaleout",
                    "service.name": f"scaleout-{role}",
                    "service.instance.id": service.instance,
                    "service.version": service.release,
                    "cloud.region": service.region,
                }
            ),
            shutdown_on_exit=False,
        )
        provider.add_span_processor(self._batches)
        self._tracer = provider.get_tracer("scaleout")

    def start(
        self, name: str, kind: Kind, above: Parent | trace.Span | None, attributes: Mapping[str, Value] | None
    ) -> Span:
        """Begin a span below one of this process or of another, or in a trace of its own."""
        if isinstance(above, Parent):
            above = NonRecordingSpan(SpanContext(above.trace_id, above.span_id, is_remote=True, trace_flags=_SAMPLED))
        # An empty context where there is none above: the SDK would look for one of its own.
        context = Context() if above is None else trace.set_span_in_context(above, Context())
        return Span(self, self._tracer.start_span(name, context, SpanKind(kind), attributes))

    def stop(self) -> None:
        """Hand over what is recorded, for `FLUSH_SECONDS` at most."""
        self._batches.shutdown()


class _Batches(SpanProcessor):
    """The bounded queue of finished spans and the thread that empties it; the SDK's own does not say what it drops."""

    def __init__(self, settings: TraceSettings) -> None:
        # The exporter writes a line and a stack for every failed try; what matters of it is logged here, once.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        self._exporter = OTLPSpanExporter(
            endpoint=f"{str(settings.endpoint).rstrip('/')}/v1/traces",
            headers=_headers(settings),
            timeout=EXPORT_SECONDS,
        )
        self._waiting: deque[ReadableSpan] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._taken = True
        self._thread = threading.Thread(target=self._run, name="traces", daemon=True)
        self._thread.start()

    def on_end(self, span: ReadableSpan) -> None:
        """Queue a finished span, or drop it if the queue is full."""
        if len(self._waiting) >= MOST_WAITING:
            TRACE_SPANS.labels("dropped").inc()
            return
        self._waiting.append(span)
        if len(self._waiting) >= BATCH:
            self._wake.set()

    def shutdown(self) -> None:
        """Export what waits, and give up after `FLUSH_SECONDS`."""
        self._stopping = True
        self._wake.set()
        self._thread.join(FLUSH_SECONDS)
        self._exporter.shutdown()  # type: ignore[no-untyped-call]  # the SDK leaves it untyped
        TRACE_SPANS.labels("dropped").inc(len(self._waiting))
        self._waiting.clear()

    def _run(self) -> None:
        while not self._stopping:
            self._wake.wait(EVERY)
            self._wake.clear()
            while self._waiting:
                self._export([self._waiting.popleft() for _ in range(min(BATCH, len(self._waiting)))])

    def _export(self, spans: list[ReadableSpan]) -> None:
        taken = self._exporter.export(spans) is SpanExportResult.SUCCESS
        TRACE_SPANS.labels("exported" if taken else "failed").inc(len(spans))
        if taken is not self._taken:
            self._taken = taken
            (log.info if taken else log.warning)("the collector takes traces" if taken else "no collector takes traces")


def _headers(settings: TraceSettings) -> dict[str, str] | None:
    """Return the headers of the collector from `name=value` pairs with commas between them, percent-encoded."""
    if settings.headers is None:
        return None
    pairs = (pair.partition("=") for pair in settings.headers.get_secret_value().split(","))
    return {name.strip().lower(): unquote(value.strip()) for name, _, value in pairs if name.strip()}
