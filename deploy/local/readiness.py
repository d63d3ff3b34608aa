"""Whether a process of the cluster can do its work now, asked of the process itself.

Each kind is asked what its users would ask: a database whether it takes connections, an instance for `/health/ready`.
"""

from __future__ import annotations

import time
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from deploy.local import ClusterError, mariadb, redis
from deploy.local.control import LOOK_INTERVAL
from deploy.local.postgres import server_accepts

if TYPE_CHECKING:
    from collections.abc import Callable

    from deploy.local.layout import Layout, Secrets
    from deploy.local.programs import Program
    from deploy.local.servers import Binaries, Tools

# A health check of ours answers within milliseconds where there is nothing else to do; one that hangs is asked again.
ANSWER_SECONDS = 5.0

# It bounds only what hangs, as what ends is noticed at once. A start takes seconds; where ten processes shared each
# core, it took more than a minute.
READY_SECONDS = 180.0

# A process that ended this often while it was waited for will not become ready by itself.
DEATHS = 3

# Enough of a log to hold a Python traceback's end.
SHOWN_LINES = 12


def is_ready(program: Program, layout: Layout, secrets: Secrets, binaries: Binaries, tools: Tools) -> bool:
    """Whether `program` can do its work now."""
    if program.kind in {"primary", "replica"}:
        if (program.address or "").startswith(f"{mariadb.MariaDb.scheme}:"):
            return mariadb.server_accepts(program.port)
        return server_accepts(binaries, tools, layout, program.port)
    if program.kind == "redis":
        return redis.is_ready(secrets, program.port)
    if program.ready_file:
        return program.ready_file.exists()
    return answers(program.health)


def answers(url: str) -> bool:
    """Whether a GET of `url` is answered with 200."""
    parts = urlsplit(url)
    connection = HTTPConnection(parts.hostname or "", parts.port, timeout=ANSWER_SECONDS)
    try:
        connection.request("GET", parts.path)
        return connection.getresponse().status == 200  # noqa: PLR2004 - the HTTP status
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def wait(program: Program, ready: Callable[[], bool], deaths: Callable[[], int], tools: Tools) -> None:
    """Wait until `ready`.

    Raises:
        ClusterError: it ended again and again, or is not ready in time; the text ends with the last lines of its log.
        CancelledError: the start was called off.
    """
    deadline = time.monotonic() + READY_SECONDS
    before = deaths()
    while not ready():
        tools.check()
        if deaths() - before >= DEATHS:
            raise ClusterError(_complaint(program, f"ended {DEATHS} times while starting"))
        if time.monotonic() > deadline:
            raise ClusterError(_complaint(program, f"was not ready within {READY_SECONDS:.0f} s"))
        time.sleep(LOOK_INTERVAL)


def _complaint(program: Program, what: str) -> str:
    log = Path(program.log)
    lines = log.read_text(errors="replace").splitlines()[-SHOWN_LINES:] if log.exists() else []
    return "\n".join([f"{program.name} {what}. The end of {log}:", *(f"  {line}" for line in lines)])
