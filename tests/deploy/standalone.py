"""Starts one of the stand-in servers as the cluster does, on ports that the system chooses, and always ends it."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
from conftest import PATIENCE

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Standalone:
    """A running server: its process and the addresses it logged, by scheme (`http`, `smtp`)."""

    process: subprocess.Popen[str]
    addresses: dict[str, str]
    log: Path

    @property
    def http(self) -> str:
        return self.addresses["http"]

    @property
    def smtp(self) -> tuple[str, int]:
        host, port = self.addresses["smtp"].removeprefix("smtp://").rsplit(":", 1)
        return host, int(port)

    def kill(self) -> None:
        """End the process as a crash would."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def started(module: str, data: Path, *port_options: str) -> Iterator[Standalone]:
    """Run `python -m module` on free ports with its state in `data` until the block is left.

    The server logs each address once it listens there; it is ready when it answers its liveness probe.
    """
    ports = [word for option in port_options for word in (option, "0")]
    command = [sys.executable, "-m", module, "--host", "127.0.0.1", "--data", str(data), *ports]
    log = data.with_suffix(f".{time.monotonic_ns()}.log")
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, text=True)  # noqa: S603
    try:
        yield Standalone(process, _addresses(process, log, len(port_options)), log)
    finally:
        process.kill()
        process.wait()


def _addresses(process: subprocess.Popen[str], log: Path, count: int) -> dict[str, str]:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        whole, _, _ = log.read_text().rpartition("\n")
        lines = [json.loads(line) for line in whole.splitlines() if line.startswith("{")]
        found = [line["address"] for line in lines if line["event"] == "listening"]
        if len(found) == count:
            addresses = {address.split(":")[0]: address for address in found}
            httpx.get(addresses["http"] + "/health/live", timeout=PATIENCE).raise_for_status()
            return addresses
        time.sleep(0.01)
    raise AssertionError(f"not listening: {log.read_text()}")
