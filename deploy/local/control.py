"""The way to a running supervisor: start it, ask it, tell it, end it.

Every call opens its own connection to the supervisor's socket, so calls may come from several threads at once.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from http.client import HTTPException
from typing import TYPE_CHECKING, Any
from xmlrpc.client import Fault, ServerProxy

from supervisor.xmlrpc import Faults, SupervisorTransport

from deploy.local import ClusterError
from deploy.local.layout import CHECKOUT, Layout, write_private

if TYPE_CHECKING:
    from deploy.local.servers import Tools

# Between two looks at something that changes within milliseconds; each look is one small request on this machine.
LOOK_INTERVAL = 0.03

# The supervisor imports and opens its socket in well under a second; on a busy laptop many times as long.
SUPERVISOR_SECONDS = 60.0

# A process is killed by the supervisor when it outstays its own stop time (30 s at most), so a stop ends before this.
STOP_SECONDS = 40.0

CONFIGURATION = """\
[supervisord]
nodaemon=true
silent=true
{user}logfile=%(here)s/logs/supervisor.log
logfile_maxbytes=5MB
logfile_backups=1
pidfile=%(here)s/supervisord.pid
childlogdir=%(here)s/logs
nocleanup=true
umask=077
minfds={files}

[unix_http_server]
file={socket}
chmod=0700

[rpcinterface:supervisor]
supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface
"""


# Open files a process may have: as many as NGINX asks for, which an instance may see as connections in its turn.
OPEN_FILES = 8192


@dataclass(frozen=True, slots=True)
class Control:
    """Talks to the supervisor of one run folder."""

    layout: Layout

    def launch(self, held: list[int], tools: Tools) -> subprocess.Popen[bytes]:
        """Start the supervisor, hand it the descriptors of what it is to hold and return when it answers.

        Raises:
            ClusterError: it ended at once, or did not answer in time.
        """
        inside = self.layout.socket.parent == self.layout.root
        write_private(
            self.layout.supervisor_config,
            CONFIGURATION.format(
                files=_open_files(),
                user="user=root\n" if os.geteuid() == 0 else "",
                # %(here)s is filled in after comments are cut off, so the path may hold any character.
                socket="%(here)s/supervisor.sock" if inside else self.layout.socket,
            ),
        )
        output = self.layout.logs / "supervisor.out"
        with output.open("wb") as log:
            process = subprocess.Popen(  # noqa: S603 - arguments are ours, no shell
                [sys.executable, "-m", "deploy.local.supervision", str(self.layout.supervisor_config)],
                cwd=CHECKOUT,
                # The servers inherit this; what the user has set is for our own processes only.
                env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "TZ": "UTC"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                pass_fds=held,
            )
        deadline = time.monotonic() + SUPERVISOR_SECONDS
        while not self.answers():
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                process.wait()
                raise ClusterError(
                    f"The supervisor did not start:\n{output.read_text(errors='replace').strip()[-1000:]}"
                )
            tools.check()
            time.sleep(LOOK_INTERVAL)
        return process

    def answers(self) -> bool:
        """Whether a supervisor answers on the socket."""
        try:
            self._call("getState")
        except (ClusterError, Fault):
            return False
        return True

    def start(self, name: str) -> None:
        """Start the process `name`; nothing happens when it runs."""
        try:
            self._call("startProcess", self._full_name(name), False)
        except Fault as fault:
            # SPAWN_ERROR: it was spawned and died at once. It will be tried again; whoever waits for it sees its log.
            if fault.faultCode not in {Faults.ALREADY_STARTED, Faults.SPAWN_ERROR}:
                raise ClusterError(f"{name} cannot be started: {fault.faultString}") from fault

    def stop(self, name: str) -> None:
        """Stop the process `name` and keep it down; returns when it has ended.

        Raises:
            ClusterError: it did not end, not even killed.
        """
        full_name = self._full_name(name)
        deadline = time.monotonic() + STOP_SECONDS
        while (state := self._call("getProcessInfo", full_name)["statename"]) != "STOPPED":
            if time.monotonic() > deadline:
                raise ClusterError(f"{name} does not stop (state {state}). See its log in {self.layout.logs}.")
            if state != "STOPPING":
                self._stop_now(full_name)
            time.sleep(LOOK_INTERVAL)

    def shut_down(self) -> None:
        """Tell the supervisor to stop all processes, tier by tier, and to end; returns at once."""
        self._call("shutdown")

    def _stop_now(self, full_name: str) -> None:
        try:
            self._call("stopProcess", full_name, False)
        except Fault as fault:
            # It died just now and waits for its restart, which can only be stopped once it has happened.
            if fault.faultCode != Faults.NOT_RUNNING:
                raise

    def _full_name(self, name: str) -> str:
        for process in self._call("getAllProcessInfo"):
            if process["name"] == name:
                return f"{process['group']}:{name}"
        raise ClusterError(f"There is no process {name}.")

    def _call(self, method: str, *arguments: object) -> Any:
        # The URL only satisfies ServerProxy; the transport goes to the socket.
        with ServerProxy(
            "http://127.0.0.1", transport=SupervisorTransport(None, None, f"unix://{self.layout.socket}")
        ) as server:
            try:
                return getattr(server.supervisor, method)(*arguments)
            except (OSError, HTTPException) as error:
                raise ClusterError(
                    "The cluster's supervisor does not answer. `scaleout down` ends what is left of the cluster."
                ) from error


def _open_files() -> int:
    """As many open files as this user may ask for, up to what the servers want."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    return OPEN_FILES if most == resource.RLIM_INFINITY else min(OPEN_FILES, most)
