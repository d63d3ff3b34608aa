"""The process that watches over all others: supervisord with what a cluster of servers needs on top.

Run as `python -m deploy.local.supervision supervisord.conf`. It reads the programs from `programs.json` beside that
file, starts again what died after a second, endlessly, and keeps `cluster.json` and `pids.json` true at every change.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from supervisor import events
from supervisor.datatypes import RestartUnconditionally
from supervisor.medusa.asyncore_25 import ExitNow
from supervisor.options import ProcessConfig, ProcessGroupConfig, ServerOptions
from supervisor.process import Subprocess
from supervisor.states import ProcessStates, SupervisorStates
from supervisor.supervisord import Supervisor

from deploy.local import leftovers
from deploy.local.layout import read_json, write_json
from deploy.local.programs import UNLISTED

# Long enough that a process which dies at once does not keep a core busy, short enough for a person who watches.
RESTART_SECONDS = 1.0

# A log is copied aside and emptied at this size, so one process keeps at most twice as much.
LOG_BYTES = 20_000_000

RUNNING = {ProcessStates.STARTING, ProcessStates.RUNNING, ProcessStates.STOPPING}


class Program(Subprocess):  # type: ignore[misc]  # the base has no types
    """One process of the cluster: writes straight to its log file and takes its children along when it dies.

    A pipe through the supervisor would cost it CPU for each line that an instance writes, and a dead supervisor would
    take every other process with it by a broken pipe.
    """

    restarts = 0

    def spawn(self) -> int | None:
        """Start the process; what its predecessor said about being ready no longer counts."""
        if self.config.ready_file:
            Path(self.config.ready_file).unlink(missing_ok=True)
        pid: int | None = super().spawn()
        if pid:
            # Not only at the loop's next turn, a second later: the files must name the new process at once.
            self.delay = 0
            self.change_state(ProcessStates.RUNNING)
        return pid

    def stop(self) -> str | None:
        """Tell the process to go, as its own end or as the end of everything; one that stands still is woken for it."""
        if self.config.options.mood == SupervisorStates.SHUTDOWN:
            self.config.stopsignal = self.config.down_signal
        if self.pid:
            leftovers.wake(self.pid)
        failure: str | None = super().stop()
        return failure

    def transition(self) -> None:
        """Let time pass: a process that died waits a second before it is started again."""
        if self.state == ProcessStates.EXITED and time.time() - self.laststop < RESTART_SECONDS:
            return
        super().transition()

    def finish(self, pid: int, status: int) -> None:
        """Note the end of the process, and end what it left: NGINX's workers outlive a killed master with its port."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        if not self.killing:
            self.restarts += 1
        super().finish(pid, status)

    def _prepare_child_fds(self) -> None:
        log = os.open(self.config.stdout_logfile, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.closerange(3, self.config.options.minfds)


class ProgramConfig(ProcessConfig):  # type: ignore[misc]  # the base has no types
    """The configuration of a `Program`, made from one entry of `programs.json`."""

    def __init__(self, options: ServerOptions, entry: dict[str, Any]) -> None:
        """Fill supervisor's parameters; what the entry does not say is the same for all."""
        given = {
            "name": entry["name"],
            "uid": entry["uid"],
            "command": shlex.join(entry["arguments"]),
            "directory": entry["folder"],
            "umask": 0o077,
            "priority": entry["order"],
            "autostart": False,
            "autorestart": RestartUnconditionally,
            # A process counts as running as soon as it is spawned; whether it is ready is asked of the process itself.
            "startsecs": 0,
            "startretries": sys.maxsize,
            "stdout_logfile": entry["log"],
            "stopsignal": getattr(signal, entry["stop_signal"]),
            "stopwaitsecs": entry["stop_seconds"],
            "stopasgroup": False,
            "killasgroup": True,
            "exitcodes": [0],
            "redirect_stderr": True,
            "environment": entry["environment"],
        }
        super().__init__(options, **(dict.fromkeys(self.req_param_names) | given))
        self.down_signal = getattr(signal, entry["down_signal"])
        self.ready_file: str | None = entry["environment"].get("READY_FILE")

    def make_process(self, group: object = None) -> Program:
        """Make the process of this configuration."""
        process = Program(self)
        process.group = group
        return process

    def make_dispatchers(self, _process: Program) -> tuple[dict[int, object], dict[str, int]]:
        """No pipes: a program writes to its log itself."""
        return {}, {}


class Programs(ServerOptions):  # type: ignore[misc]  # the base has no types
    """supervisord's options, with the programs from `programs.json`.

    JSON rather than sections of the configuration: no character of a path or an environment needs quoting there.
    """

    def process_groups_from_parser(self, _parser: object) -> list[ProcessGroupConfig]:
        """One group for each tier, which starts and stops as one."""
        tiers: dict[int, list[ProgramConfig]] = {}
        for entry in self.plan["processes"]:
            tiers.setdefault(entry["order"], []).append(ProgramConfig(self, entry))
        return [ProcessGroupConfig(self, f"tier{order}", order, programs) for order, programs in tiers.items()]

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.configfile).parent

    @property
    def plan(self) -> dict[str, Any]:
        """`programs.json`: `url`, `attached` and the list `processes`."""
        plan: dict[str, Any] = read_json(self.folder / "programs.json")
        return plan


class Wakeup:
    """Lets the main loop react to a dead child at once, not at its next full second.

    Python finishes an interrupted poll before it returns, so the signal handler alone does not end it; a byte in a pipe
    that is polled does.
    """

    def __init__(self) -> None:
        """Open the pipe and have signals written into it."""
        self.fd, writer = os.pipe()
        os.set_blocking(self.fd, False)
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def readable(self) -> bool:
        """Always waited for."""
        return True

    def writable(self) -> bool:
        """Never written by the loop."""
        return False

    def handle_read_event(self) -> None:
        """Empty the pipe."""
        with suppress(BlockingIOError):
            os.read(self.fd, 4096)


class Watch(Supervisor):  # type: ignore[misc]  # the base has no types
    """supervisord that tells the truth about its processes in two files, and ends when nobody can want it any more."""

    def runforever(self) -> None:
        """Run until told to stop; then remove the files that say that the cluster runs."""
        self.plan: dict[str, Any] = self.options.plan
        self.parent = os.getppid()
        wakeup = Wakeup()
        self.options.get_socket_map()[wakeup.fd] = wakeup
        events.subscribe(events.ProcessStateEvent, lambda _event: self.publish())
        events.subscribe(events.Tick5Event, lambda _event: self.look_around())
        self.publish()
        try:
            super().runforever()
        finally:
            for name in ("cluster.json", "pids.json"):
                (self.options.folder / name).unlink(missing_ok=True)

    def ordered_stop_groups_phase_1(self) -> None:
        """Tell the highest tier that still runs to stop; an empty one must not cost a turn of the loop."""
        while self.stop_groups and not self.stop_groups[-1].get_unstopped_processes():
            self.stop_groups.pop()
        super().ordered_stop_groups_phase_1()

    def publish(self) -> None:
        """Write `cluster.json` and `pids.json` as things are now."""
        programs = {
            program.config.name: program
            for group in self.process_groups.values()
            for program in group.processes.values()
        }
        listed, pids = [], [_identity("supervisor", os.getpid())]
        for entry in self.plan["processes"]:
            program: Program = programs[entry["name"]]
            pid = program.pid if program.state in RUNNING and program.pid else None
            with suppress(psutil.NoSuchProcess):
                pids += [_identity(entry["name"], pid)] if pid else []
            if entry["kind"] in UNLISTED:
                continue
            listed.append(
                {
                    "name": entry["name"],
                    "kind": entry["kind"],
                    "pid": pid,
                    "address": entry["address"],
                    "log": entry["log"],
                }
                | ({"http_address": entry["http_address"]} if entry["http_address"] else {})
                | {"state": _state(program), "restarts": program.restarts}
            )
        folder: Path = self.options.folder
        # The folder may have been deleted under us; look_around ends the cluster then.
        with suppress(FileNotFoundError):
            write_json(folder / "pids.json", pids)
            write_json(folder / "cluster.json", {"url": self.plan["url"], "processes": listed})

    def look_around(self) -> None:
        """Every five seconds: keep logs bounded; end when the run folder, or a caller that we belong to, is gone."""
        orphaned = self.plan["attached"] and os.getppid() != self.parent
        if orphaned or not (self.options.folder / "programs.json").exists():
            self.options.mood = SupervisorStates.SHUTDOWN
        for entry in self.plan["processes"]:
            _bound(Path(entry["log"]))


def _bound(log: Path) -> None:
    """Keep a log below its size. Lines written in the instant between the copy and the cut are lost."""
    with suppress(FileNotFoundError):
        if log.stat().st_size > LOG_BYTES:
            log.with_suffix(".log.1").write_bytes(log.read_bytes())
            os.truncate(log, 0)


def _identity(name: str, pid: int) -> dict[str, Any]:
    """What recognises a process later: its id together with its creation time."""
    process = psutil.Process(pid)
    return {"name": name, "pid": pid, "created": process.create_time()}


def _state(program: Program) -> str:
    words = {ProcessStates.RUNNING: "running", ProcessStates.STOPPED: "stopped", ProcessStates.STOPPING: "stopping"}
    return words.get(program.state, "restarting" if program.laststart else "stopped")


def main() -> None:
    """Run the supervisor with the configuration named on the command line."""
    options = Programs()
    options.realize(["-c", str(Path(sys.argv[1]).resolve()), "--nodaemon"])
    options.first, options.test = True, False
    with suppress(ExitNow):
        Watch(options).main()


if __name__ == "__main__":
    main()
