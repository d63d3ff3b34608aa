"""The common ground of the two servers that stand for what the service does not own.

The payment provider and the SMTP sink share their mode switch, their SQLite book, their bounded JSON bodies, their
JSON error answers and log lines, and the way they listen and stop. What this room acknowledges survives a kill -9.
"""

import argparse
import asyncio
import contextlib
import json
import logging
import socket
import sqlite3
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Lifespan, Message, Receive, Scope, Send

SLOW_SECONDS = 5.0
"""What API.md promises for `tok_slow`; longer than any sane call to a provider waits, shorter than a request's 10 s."""

MAX_BODY_BYTES = 16_384
"""The largest real body (an authorisation) is under 1 KB; the rest is room for growth, not for an attack."""

LOCK_SECONDS = 5.0
"""How long a statement waits for another process that has the book open, such as a reader with the sqlite3 shell."""

GRACE_SECONDS = 1
"""After SIGTERM a call may finish within this time; a held-back slow answer is cut instead of delaying Ctrl-C."""

T = TypeVar("T")

_log = logging.getLogger("sandbox")


class Refused(HTTPException):
    """A call that this server answers with an error: HTTP status, stable code, and one sentence for a person."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(status, message)
        self.code = code


class Mode:
    """The one switch of a server: how it behaves towards everyone until it is told otherwise or restarted.

    Args:
        known: the names that `POST /mode` accepts; the server starts in `ok`.
    """

    def __init__(self, *known: str) -> None:
        self._known = known
        self.name = "ok"

    def routes(self) -> list[Route]:
        """`GET /mode` and `POST /mode {"mode": name}`; both answer `{"mode": name}`, an unknown name is 400."""
        return [Route("/mode", self._show, methods=["GET"]), Route("/mode", self._switch, methods=["POST"])]

    async def _show(self, _request: Request) -> Response:
        return JSONResponse({"mode": self.name})

    async def _switch(self, request: Request) -> Response:
        wanted = (await read_object(request)).get("mode")
        if wanted not in self._known:
            raise Refused(400, "unknown_mode", f"Send a JSON object whose mode is one of: {', '.join(self._known)}.")
        self.name = str(wanted)
        _log.info("mode switched", extra={"mode": self.name})
        return JSONResponse({"mode": self.name})


class Book:
    """A SQLite file behind one thread, so that calls are ordered and the event loop never waits for the disk.

    Each call is one transaction: committed and synced when it returns, rolled back when it raises.

    Args:
        path: the database file; its folder is created.
        schema: statements that create what is missing, run at each start.
    """

    def __init__(self, path: Path, schema: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="book")
        self._connection = self._thread.submit(self._open, path, schema).result()

    @staticmethod
    def _open(path: Path, schema: str) -> sqlite3.Connection:
        connection = sqlite3.connect(path, timeout=LOCK_SECONDS, isolation_level=None)
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.executescript(schema)
        return connection

    async def run(self, transaction: Callable[[sqlite3.Connection], T]) -> T:
        """Run `transaction(connection)` in the book's thread and return its result once it is on the disk."""
        return await asyncio.wrap_future(self._thread.submit(self._commit, transaction))

    def _commit(self, transaction: Callable[[sqlite3.Connection], T]) -> T:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            result = transaction(self._connection)
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")
        return result

    def close(self) -> None:
        """Wait for the running transaction and close the file; without it nothing is lost either."""
        self._thread.submit(self._connection.close).result()
        self._thread.shutdown()


class _CallLog:
    """ASGI middleware: one log line a call, with the caller's idempotency key; liveness probes are left out."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == "/health/live":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), None

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        await self._app(scope, receive, noted)
        fields = {
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "ms": round((time.perf_counter() - started) * 1000, 1),
            "idempotency_key": Request(scope).headers.get("idempotency-key"),
        }
        _log.info("call answered" if status else "connection dropped", extra=fields)


class _JsonLines(logging.Formatter):
    """One JSON object a line: time, level, event, what the call site passed as `extra`, and a stack if there is one."""

    _own = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}

    def format(self, record: logging.LogRecord) -> str:
        fields = {name: value for name, value in vars(record).items() if name not in self._own and value is not None}
        line = {"time": now(), "level": record.levelname.lower(), "event": record.getMessage(), **fields}
        if record.exc_info:
            line["stack"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def now() -> str:
    """The time in UTC as RFC 3339 with milliseconds, such as `2026-11-21T03:13:41.123Z`."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


async def read_object(request: Request) -> dict[str, Any]:
    """Read the body as a JSON object; an empty body is an empty object.

    Raises:
        Refused: 413 for a body past `MAX_BODY_BYTES`, 400 for one that is not a JSON object.
    """
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise Refused(413, "body_too_large", f"Send a body of at most {MAX_BODY_BYTES} bytes.")
    try:
        value = json.loads(bytes(body) or b"{}")
    except (ValueError, RecursionError) as error:
        raise Refused(400, "invalid_json", "Send a body that is valid JSON.") from error
    if not isinstance(value, dict):
        raise Refused(400, "invalid_json", "Send a JSON object.")
    return value


async def _alive(_request: Request) -> Response:
    return JSONResponse({"status": "ok"})


async def _refuse(_request: Request, error: Exception) -> Response:
    """Answer `{"error": {"code", "message"}}` for what we refuse and for unknown paths and methods."""
    if not isinstance(error, HTTPException):
        raise error
    code = error.code if isinstance(error, Refused) else error.detail.lower().replace(" ", "_")
    body = {"error": {"code": code, "message": error.detail}}
    return JSONResponse(body, status_code=error.status_code, headers=error.headers)


async def _gone(_request: Request, _error: Exception) -> Response:
    """End a call whose client left in the middle of its body; nobody reads this answer."""
    return Response(status_code=400)


def application(
    routes: Sequence[Route], *middleware: Middleware, lifespan: Lifespan[Starlette] | None = None
) -> Starlette:
    """An application with `GET /health/live`, JSON errors and one log line a call, `middleware` inside of that."""
    return Starlette(
        routes=[Route("/health/live", _alive), *routes],
        middleware=[Middleware(_CallLog), *middleware],
        exception_handlers={HTTPException: _refuse, ClientDisconnect: _gone},
        lifespan=lifespan,
    )


def arguments(description: str, *more_ports: str) -> argparse.Namespace:
    """Parse `--host`, `--port`, `--data` and the named further port options; port 0 lets the system choose."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    for option in ("--port", *more_ports):
        parser.add_argument(option, type=int, required=True, help="port to listen on; 0: any free one")
    parser.add_argument("--data", type=Path, required=True, help="folder that keeps the state")
    return parser.parse_args()


def log_to_stdout() -> None:
    """Write every log record as a JSON line to standard output, from INFO; uvicorn's and aiosmtpd's from WARNING."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for noisy in ("uvicorn.error", "mail.log"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def listen(scheme: str, host: str, port: int) -> socket.socket:
    """Listen, and log the address as `scheme://host:port` with the port that was really taken.

    Raises:
        SystemExit: the address cannot be had; the sentence says which and what to do.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        sys.exit(f"Cannot listen on {host} port {port} ({error}): choose another port or stop what uses it.")
    shown = f"[{host}]" if family is socket.AF_INET6 else host
    _log.info("listening", extra={"address": f"{scheme}://{shown}:{listener.getsockname()[1]}"})
    return listener


def serve(app: Starlette, listener: socket.socket, protocol: type[asyncio.Protocol]) -> None:
    """Serve `app` with uvicorn on `listener` until SIGTERM or SIGINT; `protocol` is uvicorn's or derived from it."""
    config = uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listener])
