"""The cluster as a person sees it in a terminal: progress, tables, logs, and what Ctrl-C does.

Everything here also reads well in a file: without a terminal there are plain lines, no colours and no moving parts.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from deploy.local import ClusterError, tour
from deploy.local.programs import not_running

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

    from deploy.local.cluster import Cluster
    from deploy.local.programs import Process

# How often a watched cluster is looked at, and a followed log read: a person notices no difference below this.
WATCH_SECONDS = 0.5

console = Console(highlight=False, soft_wrap=True)


class Display:
    """Progress of a start: a line for each piece of work, with a spinner where the terminal can show one."""

    def __init__(self) -> None:
        self._bars = Progress(
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=console,
        )
        self._moving = console.is_terminal

    def __enter__(self) -> Self:
        if self._moving:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._moving:
            self._bars.stop()

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Show the work that `title` names, and how long it took."""
        if self._moving:
            task = self._bars.add_task(title, total=1)
            yield
            self._bars.update(task, completed=1)
        else:
            begun = time.monotonic()
            yield
            console.print(f"  {title}: {time.monotonic() - begun:.1f} s")

    def say(self, text: str) -> None:
        """Show a remark."""
        console.print(text)


def up(cluster: Cluster, *, detach: bool) -> int:
    """Start the cluster, show where everything is, and, unless detached, stay until Ctrl-C; returns the exit code."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    begun = time.monotonic()
    try:
        with Display() as display:
            supervisor = cluster.up(display, attached=not detach)
        _show_start(cluster, time.monotonic() - begun, detach=detach)
        return 0 if detach else _stay(cluster, supervisor)
    except KeyboardInterrupt:
        if cluster.running:
            cluster.hurry()
        console.print("Stopped before it was ready; nothing is left running.")
        return 128 + signal.SIGINT


def down(cluster: Cluster, *, wipe: bool) -> None:
    """Stop the cluster; Ctrl-C while it stops kills what is left."""
    begun = time.monotonic()
    console.print("Stopping: open requests and tasks finish first …")
    try:
        was_running = cluster.down(wipe=wipe)
    except KeyboardInterrupt:
        console.print("Hurrying: killing what still runs.")
        cluster.hurry()
        cluster.down(wipe=wipe)
        was_running = True
    kept = "all data is removed" if wipe else f"the data stays in {_short(cluster.layout.root)}"
    said = f"Everything is stopped ({time.monotonic() - begun:.1f} s)" if was_running else "Nothing was running"
    console.print(f"{said}; {kept}.")


def status(cluster: Cluster, *, as_json: bool) -> int:
    """Show every process; returns 0 only when all are ready."""
    if not cluster.running:
        if as_json:
            sys.stdout.write(json.dumps({"url": "", "processes": []}) + "\n")
            return 1
        raise ClusterError(not_running(cluster.layout))
    states = cluster.status()
    processes = cluster.processes
    if as_json:
        listed = [asdict(process) | {"state": states[process.name]} for process in processes]
        sys.stdout.write(json.dumps({"url": cluster.url, "processes": listed}, indent=1) + "\n")
    else:
        console.print(_table(processes, states))
    missing = [f"{name} ({state})" for name, state in states.items() if state != "ready"]
    if missing and not as_json:
        console.print(f"Not ready: {', '.join(missing)}.")
    return 1 if missing else 0


def logs(cluster: Cluster, name: str, *, lines: int, follow: bool) -> None:
    """Print the last `lines` of a process' log, and go on with what comes until Ctrl-C when following."""
    log = Path(cluster.process(name).log)
    with log.open("rb") as file:
        sys.stdout.buffer.write(b"".join(file.readlines()[-lines:]))
        sys.stdout.flush()
        while follow:
            if file.tell() > log.stat().st_size:
                file.seek(0)
            if new := file.read():
                sys.stdout.buffer.write(new)
                sys.stdout.flush()
            else:
                time.sleep(WATCH_SECONDS)


def _stay(cluster: Cluster, supervisor: subprocess.Popen[bytes]) -> int:
    """Report what dies and comes back, until Ctrl-C or until somebody else stops the cluster."""
    restarts = {process.name: process.restarts for process in cluster.processes}
    try:
        while True:
            try:
                supervisor.wait(WATCH_SECONDS)
            except subprocess.TimeoutExpired:
                restarts = _report_restarts(cluster, restarts)
            else:
                if supervisor.returncode == 0:
                    console.print("The cluster was stopped from elsewhere.")
                    return 0
                cluster.down()
                console.print(
                    f"The supervisor ended unexpectedly (exit code {supervisor.returncode}); all else is stopped."
                )
                return 1
    except KeyboardInterrupt:
        console.print()
        down(cluster, wipe=False)
        return 0


def _report_restarts(cluster: Cluster, before: dict[str, int]) -> dict[str, int]:
    try:
        processes = cluster.processes
    except ClusterError:
        # Being stopped from elsewhere; the supervisor's end is noticed next.
        return before
    for process in processes:
        if process.restarts > before[process.name] and process.pid:
            console.print(
                f"{process.name} ended and was started again (process {process.pid}); see {_short(Path(process.log))}"
            )
    return {process.name: process.restarts if process.pid else before[process.name] for process in processes}


def _show_start(cluster: Cluster, seconds: float, *, detach: bool) -> None:
    processes = cluster.processes
    console.print(_table(processes, {}))
    console.print(f"Passwords and the addresses with them: {_short(cluster.layout.cluster)}")
    mailbox = next((process.http_address for process in processes if process.kind == "smtp"), None)
    if cluster.url and mailbox:
        console.print("\nTry it: paste these into another terminal, one after the other.")
        for stop in tour.stops(cluster.url, mailbox):
            sys.stdout.write(f"\n# {stop.title}\n" + "".join(f"{line}\n" for line in stop.lines))
        sys.stdout.flush()
    ending = "scaleout status shows it, scaleout down stops it." if detach else "Ctrl-C stops everything."
    console.print(f"\nReady after {seconds:.1f} s: {cluster.url or 'no instances'}  ({ending})", style="bold")


def _table(processes: list[Process], states: dict[str, str]) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("process", *(["state"] if states else []), "pid", "address"):
        table.add_column(heading, no_wrap=heading != "address", overflow="fold")
    for process in processes:
        table.add_row(
            process.name,
            *([states[process.name]] if states else []),
            str(process.pid or "-"),
            # Without the password: a terminal's output ends up in tickets and recordings.
            re.sub(r"://([^:/@]*):[^@]*@", r"://\1@", process.address or "").replace("://@", "://"),
        )
        if process.http_address:
            table.add_row(*[""] * (len(table.columns) - 1), f"{process.http_address}/messages")
    return table


def _short(path: Path) -> str:
    """A path as short as it can be said from here."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    """Treat the end of the terminal, and a polite kill, like Ctrl-C."""
    raise KeyboardInterrupt
