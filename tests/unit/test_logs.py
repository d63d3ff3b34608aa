"""Log lines: one JSON object each, with the request id of the work at hand, and nothing that was bound to a statement.

Logging is set up once a process for all of it, so each test looks at a process of its own.
"""

import json
import subprocess
import sys
from typing import Any

import pytest

PREAMBLE = """
import logging, warnings
from pathlib import Path
from uuid import UUID
from app.core import context
from app.core.settings import ServiceSettings
from app.core.telemetry import configure_logging, logger
settings = ServiceSettings(secret_key="hush-" * 10, instance="api-7", log_format="json")
configure_logging(settings, "api")
"""


def lines_of(script: str) -> list[dict[str, Any]]:
    """Run a script in a fresh process and return its log lines."""
    done = subprocess.run(  # noqa: S603  # our own interpreter and script
        [sys.executable, "-c", PREAMBLE + script], check=True, capture_output=True, text=True, timeout=30
    )
    assert done.stderr == ""
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.sabotage(path="app/core/telemetry.py", take_out="        _work,\n", put="")
def test_a_line_carries_the_request_id_and_the_caller_of_the_work_at_hand() -> None:
    first, second = lines_of("""
with context.working(context.Work("req-12345678", profile_id=UUID(int=7))):
    logger("room").info("sold", pieces=3)
logger("room").warning("idle")
""")
    assert first["request_id"] == "req-12345678"
    assert first["profile_id"] == "00000000-0000-0000-0000-000000000007"
    assert {key: first[key] for key in ("event", "level", "logger", "pieces", "instance", "role")} == {
        "event": "sold", "level": "info", "logger": "room", "pieces": 3, "instance": "api-7", "role": "api",
    }  # fmt: skip
    assert first["timestamp"].endswith("Z")
    assert "request_id" not in second


def test_lines_of_libraries_and_warnings_have_the_same_shape() -> None:
    first, second = lines_of("""
with context.working(context.Work("req-12345678")):
    logging.getLogger("some.library").info("hello %s", "there")
warnings.warn("old call", DeprecationWarning)
""")
    assert (first["event"], first["request_id"], first["logger"]) == ("hello there", "req-12345678", "some.library")
    assert "old call" in second["event"]


def test_an_exception_is_one_line_and_holds_its_stack() -> None:
    (line,) = lines_of("""
try:
    1 / 0
except ZeroDivisionError:
    logger("room").exception("failed")
""")
    assert "ZeroDivisionError" in line["exception"]


def test_a_line_break_in_a_value_cannot_forge_a_line() -> None:
    (line,) = lines_of("""logger("room").info("login", agent='x"}\\n{"event": "forged"}')""")
    assert line["event"] == "login"


def test_the_settings_do_not_log_their_secret() -> None:
    (line,) = lines_of("""logger("room").info("start", settings=settings)""")
    assert "hush" not in json.dumps(line)
