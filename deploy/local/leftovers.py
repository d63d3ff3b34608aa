"""One cluster a folder, whatever happened before: the lock, and the ends of what a killed cluster left running.

The lock is held by the supervisor for its whole life, so it tells a running cluster from a dead one without trusting
any file. Processes are recognised by id and creation time together, never by id alone.
"""

from __future__ import annotations

import fcntl
import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil

from deploy.local import ClusterError
from deploy.local.layout import Layout, read_json, write_private

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

# The creation time of a process is computed from the machine's start, which moves a little when the clock is set.
CLOCK_TOLERANCE = 2.0

# Servers finish what they do when asked to; PostgreSQL's fast shutdown takes the longest.
ASK_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Lock:
    """The held lock of a run folder."""

    descriptor: int

    @classmethod
    def take(cls, layout: Layout) -> Lock | None:
        """Take the lock, or return None when a cluster starts, runs or stops in this folder."""
        descriptor = os.open(layout.lock, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        return cls(descriptor)

    def release(self) -> None:
        """Give up our hold; a supervisor that was handed the lock goes on holding it."""
        os.close(self.descriptor)


def is_held(layout: Layout) -> bool:
    """Whether a cluster starts, runs or stops in this folder."""
    if not layout.lock.exists():
        return False
    lock = Lock.take(layout)
    if lock:
        lock.release()
    return lock is None


def end_all(layout: Layout, data_folders: Iterable[Path], report: Callable[[str], None]) -> None:
    """End every process that an earlier cluster of this folder left, and remove what it would trip over.

    Only the holder of the lock may call this. `report` is told in words when there was something to end.
    """
    left = recorded(layout)
    for folder in data_folders:
        left += _postmaster(folder)
    if left:
        names = ", ".join(sorted({process.name() for process in left if process.is_running()}))
        report(f"Ending what an earlier cluster left running: {names}")
        end(left)
    for folder in data_folders:
        # Its process is gone. In a container its id is soon someone else's, and PostgreSQL would refuse to start.
        (folder / "postmaster.pid").unlink(missing_ok=True)
    for file in (layout.cluster, layout.pids, layout.socket):
        file.unlink(missing_ok=True)


def end_recorded(layout: Layout, *, hurry: bool = False) -> bool:
    """End the processes of `pids.json`, at once in a hurry; returns whether there were any."""
    left = recorded(layout)
    end(left, hurry=hurry)
    for file in (layout.cluster, layout.pids):
        file.unlink(missing_ok=True)
    return bool(left)


def recorded(layout: Layout) -> list[psutil.Process]:
    """The processes of `pids.json` that still live, and those that they left in their groups; the supervisor first."""
    try:
        entries: list[dict[str, Any]] = read_json(layout.pids)
    except (FileNotFoundError, ClusterError):
        return []
    leaders = [process for entry in entries if (process := _same(entry))]
    known = {process.pid for process in leaders}
    dead_groups = {entry["pid"]: entry["created"] for entry in entries if not psutil.pid_exists(entry["pid"])}
    for process in psutil.process_iter() if dead_groups else ():
        # An id is not given away while a group has its name, so the members of a dead leader's group are its children.
        with suppress(psutil.Error, ProcessLookupError):
            group = os.getpgid(process.pid)
            if (
                group in dead_groups
                and process.pid not in known
                and process.create_time() >= dead_groups[group] - CLOCK_TOLERANCE
            ):
                leaders.append(process)
    return leaders


def end(processes: list[psutil.Process], *, hurry: bool = False) -> None:
    """End processes: first a kind word, then, after a while or in a hurry, the last one; return when they are gone."""
    # The supervisor would start again what we end.
    for process in processes:
        wake(process.pid)
        with suppress(psutil.NoSuchProcess):
            if "deploy.local.supervision" in process.cmdline():
                process.kill()
    if not hurry:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                # SIGINT is PostgreSQL's fast shutdown; SIGTERM would wait for its clients to leave.
                process.send_signal(signal.SIGINT if process.name() == "postgres" else signal.SIGTERM)
        _, processes = psutil.wait_procs(processes, timeout=ASK_SECONDS)
    for process in processes:
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            # In its group are children that it can no longer end itself.
            if os.getpgid(process.pid) == process.pid:
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
    psutil.wait_procs(processes, timeout=ASK_SECONDS)


def wake(pid: int) -> None:
    """Let a process that stands still, and its children, go on: else it does not hear what it is told to do.

    Killing it instead would leave the children standing for ever that are in groups of their own, as PostgreSQL's are.
    """
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for each in (process, *process.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                each.resume()


def lives(process: psutil.Process) -> bool:
    """Whether a process has not ended; one that nobody has buried has."""
    with suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def wait_until_released(layout: Layout, seconds: float) -> bool:
    """Wait until nobody holds the lock; False when somebody still does after `seconds`."""
    deadline = time.monotonic() + seconds
    while is_held(layout):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def note_starter(layout: Layout) -> None:
    """Record who starts the cluster, for the words that a second start says."""
    write_private(layout.root / "starter", str(os.getpid()))


def starter(layout: Layout) -> int | None:
    """The id of the process that starts the cluster; None when it is not known or gone."""
    with suppress(OSError, ValueError):
        pid = int((layout.root / "starter").read_text())
        return pid if psutil.pid_exists(pid) else None
    return None


def _same(entry: dict[str, Any]) -> psutil.Process | None:
    """The process of an entry of `pids.json`, if it is still that one."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(entry["pid"])
        if abs(process.create_time() - entry["created"]) < CLOCK_TOLERANCE and lives(process):
            return process
    return None


def _postmaster(folder: Path) -> list[psutil.Process]:
    """The PostgreSQL server that works in `folder` without being recorded."""
    with suppress(OSError, ValueError, IndexError, psutil.Error):
        process = psutil.Process(int((folder / "postmaster.pid").read_text().splitlines()[0]))
        if process.cwd() == str(folder):
            return [process]
    return []
