"""The cluster's face: `Cluster(folder).up()`, `stop`, `start`, `kill`, `status`, `down`.

`up` starts what depends on nothing at once, waits for conditions and never for a time, and undoes everything when it
fails or is interrupted. The other methods work from any process, also on a cluster that somebody else started.
"""

from __future__ import annotations

import os
import signal as signals
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from deploy.local import ClusterError, leftovers, readiness
from deploy.local.control import STOP_SECONDS, Control
from deploy.local.layout import Layout, Secrets, read_environment, read_json
from deploy.local.programs import Process, Program, Sizes, not_running, processes
from deploy.local.servers import Binaries, Tools, unprivileged_account
from deploy.local.start import Progress, Silence, Start, Wish

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

# Tiers stop one after the other, each within the time of its slowest process.
DOWN_SECONDS = 2 * STOP_SECONDS


class Cluster:
    """One cluster, kept in the folder `directory` (`.cluster` of a checkout, or a temporary one).

    `port` is NGINX's; None takes a free one, and free ones for all others too, for tests. `environment` wins over what
    the caller's own holds. `seed=False` leaves the database empty. `database` is `postgresql` or `mariadb`. `doors` and
    `storage` are as `Plan` has them. `durable=False` suits data that is thrown away: see `Databases`.
    """

    def __init__(
        self,
        directory: Path,
        *,
        port: int | None = None,
        sizes: Sizes = Sizes(),  # noqa: B008 - frozen
        environment: Mapping[str, str] | None = None,
        seed: bool = True,
        reload: bool = False,
        database: str = "postgresql",
        doors: Mapping[str, int] | None = None,
        storage: str | None = None,
        durable: bool = True,
    ) -> None:
        """Describe the cluster; nothing is touched yet."""
        self._account = unprivileged_account()
        self._layout = Layout.of(directory, self._account)
        self._control = Control(self._layout)
        self._supervisor: subprocess.Popen[bytes] | None = None
        own = dict(os.environ) | dict(environment or {})
        self._wish = Wish(port, sizes, own, seed, reload, database, doors or {}, storage, durable)

    @property
    def layout(self) -> Layout:
        """Where this cluster keeps its files."""
        return self._layout

    @property
    def url(self) -> str:
        """Where clients go; empty when neither NGINX nor an instance is part of the cluster."""
        return str(self._plan()["url"])

    @property
    def environment(self) -> dict[str, str]:
        """The environment in which our own commands find this cluster's servers."""
        try:
            return read_environment(self._layout.environment)
        except FileNotFoundError as error:
            raise ClusterError(not_running(self._layout)) from error

    @property
    def running(self) -> bool:
        """Whether the cluster starts, runs or stops now."""
        return leftovers.is_held(self._layout)

    @property
    def processes(self) -> list[Process]:
        """All processes as they are now."""
        return processes(self._layout)

    def process(self, name: str) -> Process:
        """One process as it is now."""
        self._named(name)
        return next(process for process in self.processes if process.name == name)

    def up(self, progress: Progress | None = None, *, attached: bool = True) -> subprocess.Popen[bytes]:
        """Start the cluster and return when every process is ready.

        An `attached` cluster ends by itself, in order, when the calling process is gone. Returns the supervisor's
        process, whose end is the end of the cluster.

        Raises:
            ClusterError: it runs already, a port is in use, or a process does not start; nothing is left running.
        """
        progress = progress or Silence()
        self._layout.create_root()
        lock = leftovers.Lock.take(self._layout)
        if lock is None:
            raise ClusterError(self._already_running())
        with ExitStack() as undo:
            undo.callback(lock.release)
            leftovers.note_starter(self._layout)
            start = Start(self._layout, self._wish, progress, Tools(self._account))
            undo.callback(start.call_off)
            start.prepare(attached=attached)
            supervisor = start.run(lock.descriptor)
            undo.pop_all()
            lock.release()
        self._supervisor = supervisor
        return supervisor

    def start(self, name: str) -> None:
        """Start the process `name` and return when it is ready."""
        program = self._named(name)
        tools = Tools(self._account)
        self._control.start(name)
        readiness.wait(program, self._ready(program, tools), lambda: self.process(name).restarts, tools)

    def stop(self, name: str) -> None:
        """Stop the process `name` as its operator would, and keep it down until `start`."""
        self._named(name)
        self._control.stop(name)

    def roll_out(self, replaced: Callable[[str], None]) -> None:
        """Replace every instance by a new process, one after the other; the others serve meanwhile.

        `replaced` is told the name of each one that is ready again.

        Raises:
            ClusterError: a single instance would leave nobody to serve; or one is not ready in time, and the rest stay.
        """
        names = [process.name for process in self.processes if process.kind == "api"]
        if len(names) == 1:
            raise ClusterError("A rollout needs a second instance to serve meanwhile: INSTANCES=2 make run.")
        for name in names:
            self.stop(name)
            self.start(name)
            replaced(name)

    def kill(self, name: str, signal: int = signals.SIGKILL) -> int:
        """Send a signal to the process `name` and return the id it was sent to; the supervisor starts it again.

        Raises:
            ClusterError: it is down.
        """
        pid = self.process(name).pid
        if pid is None:
            raise ClusterError(f"{name} is down. `scaleout start {name}` starts it.")
        os.kill(pid, signal)
        return pid

    def status(self) -> dict[str, str]:
        """The state of each process by name: `ready`, `starting`, `stopping`, `stopped` or `restarting`."""
        tools = Tools(self._account)
        processes = self.processes
        programs = {program.name: program for program in self._programs()}

        def state(process: Process) -> str:
            if process.state != "running":
                return process.state
            return "ready" if self._ready(programs[process.name], tools)() else "starting"

        with ThreadPoolExecutor(len(processes)) as pool:
            return dict(zip([process.name for process in processes], pool.map(state, processes), strict=True))

    def down(self, *, wipe: bool = False) -> bool:
        """Stop everything, the edge first and the primary last; with `wipe` remove all data too.

        Also ends what a killed cluster left. Returns whether anything was running.

        Raises:
            ClusterError: it did not stop in time; `hurry` kills what is left.
        """
        was_running = self.running
        if was_running:
            if self._control.answers():
                self._control.shut_down()
            else:
                leftovers.end_recorded(self._layout)
            if not leftovers.wait_until_released(self._layout, DOWN_SECONDS):
                raise ClusterError(self._already_running())
        elif self._layout.root.exists():
            was_running = leftovers.end_recorded(self._layout)
        if self._supervisor:
            self._supervisor.wait()
            self._supervisor = None
        if wipe:
            self._layout.wipe()
        return was_running

    def hurry(self) -> None:
        """Kill everything now; the databases recover at the next start."""
        leftovers.end_recorded(self._layout, hurry=True)

    def _ready(self, program: Program, tools: Tools) -> Callable[[], bool]:
        secrets = Secrets.load(self._layout)
        binaries = Binaries.find(self._layout, self._account, self._wish.environment)
        return lambda: readiness.is_ready(program, self._layout, secrets, binaries, tools)

    def _plan(self) -> dict[str, Any]:
        try:
            plan: dict[str, Any] = read_json(self._layout.programs)
        except FileNotFoundError as error:
            raise ClusterError(not_running(self._layout)) from error
        return plan

    def _programs(self) -> list[Program]:
        return [Program(**entry) for entry in self._plan()["processes"]]

    def _named(self, name: str) -> Program:
        if not self.running:
            raise ClusterError(not_running(self._layout))
        programs = {program.name: program for program in self._programs()}
        if name not in programs:
            raise ClusterError(f"There is no process {name!r}. There are: {', '.join(programs)}.")
        return programs[name]

    def _already_running(self) -> str:
        where = f"in {self._layout.root}"
        if not self._layout.cluster.exists():
            starter = leftovers.starter(self._layout)
            who = f" by process {starter}" if starter else ""
            return f"A cluster is being started or stopped {where}{who}. Wait for it, or press Ctrl-C there."
        return f"A cluster already runs {where}: {self.url}. `scaleout status` shows it, `scaleout down` stops it."
