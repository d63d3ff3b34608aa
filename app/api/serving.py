"""The server around one instance: uvicorn, with a way out that loses no request.

uvicorn by itself closes its listener at the first SIGTERM, and every idle connection with it, before a balancer knows.
Here an instance that is told to go says so first (readiness is 503), serves on for a while and asks its connections to
close behind each answer; only then it stops listening, finishes what is in flight, and closes its pools last.
"""

import asyncio
import signal
import socket
from contextlib import suppress
from enum import IntEnum
from types import FrameType

import uvicorn
from uvicorn.supervisors import ChangeReload

from app.api import metrics
from app.api.door import CLOSE
from app.api.protocol import Protocol
from app.core.settings import ServiceSettings
from app.core.telemetry import logger
from app.scaling.lifecycle import Lifecycle, Phase

log = logger(__name__)

# Seconds. Requests in flight get twice a request's own deadline; whoever supervises kills after 30.
_FINISH = 20
# Seconds for what arrived while the listener closed to be read, which takes milliseconds; until then an idle connection
# looks like one whose request is on its way.
_SETTLE = 0.25
# New connections that one turn of the event loop takes. By itself it takes one of each listener (libuv since 1.45), so
# that of a crowd of 1,500, who come while turns last 20 ms, the last would wait half a minute before the first byte is
# read. So there are as many listeners on the one socket. Sixteen connections are two milliseconds of work.
ACCEPTED_A_TURN = 16


class Leaving(IntEnum):
    """How far an instance has been told to go; each further signal takes it one step on."""

    NOT = 0
    SERVING_ON = 1  # SIGTERM: not ready any more, but every request is served
    FINISHING = 2  # SIGINT, or a second SIGTERM: nothing new, what is in flight finishes
    AT_ONCE = 3  # nothing is waited for


class Server(uvicorn.Server):
    """uvicorn's server, which leaves in steps.

    Args:
        config: uvicorn's; its application's lifespan state holds `lifecycle`.
        serve_on: seconds between SIGTERM and the end of listening, for balancers to see readiness fail.
    """

    def __init__(self, config: uvicorn.Config, *, serve_on: float) -> None:
        super().__init__(config)
        self._serve_on = serve_on
        self._leaving = Leaving.NOT
        self._loop: asyncio.AbstractEventLoop | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002  # the signature of a handler
        """Go one step further; uvicorn calls this from the signal handler."""
        step = Leaving(min(self._leaving + 1, Leaving.AT_ONCE))
        self._leaving = max(step, Leaving.FINISHING) if sig == signal.SIGINT else step
        if self._loop is None:  # still starting: there is nothing to finish
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self._go)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen."""
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        metrics.count_requests(lambda: len(self.server_state.tasks))
        for listening in self._duplicates():
            for same in (listening, *(listening.dup() for _ in range(ACCEPTED_A_TURN - 2))):
                self.servers.append(
                    await self._loop.create_server(self._protocol, sock=same, backlog=self.config.backlog)
                )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening without losing a connection that was already made, finish, close."""
        self._drain()  # uvicorn may also end by itself, at its limit of requests
        await self._stop_listening()
        await super().shutdown(sockets)

    def _go(self) -> None:
        """Do what the step asks for, on the event loop."""
        self._drain()
        if self._leaving is Leaving.SERVING_ON and self._loop is not None:
            self._loop.call_later(self._serve_on, self._finish)
        else:
            self._finish()
        self.force_exit = self._leaving is Leaving.AT_ONCE

    def _finish(self) -> None:
        self.should_exit = True

    def _drain(self) -> None:
        """Fail readiness, and let each connection close behind its next answer, so that none is idle at the end."""
        lifecycle: Lifecycle = self.lifespan.state["lifecycle"]
        if lifecycle.phase < Phase.DRAINING:
            lifecycle.enter(Phase.DRAINING)
            self.config.encoded_headers.append(CLOSE)
            self.server_state.default_headers = [*self.server_state.default_headers, CLOSE]

    async def _stop_listening(self) -> None:
        """Close the listeners, and serve the connections that the kernel had made by then.

        Closing alone would reset those that wait to be accepted, and a balancer does not repeat a POST.
        """
        listening = self._duplicates()
        for server in self.servers:
            server.close()
        await asyncio.sleep(0)  # the event loop forgets a closed listener in its next turn
        for waiting in listening:
            await self._accept_all(waiting)
            waiting.close()
        await asyncio.sleep(_SETTLE)

    async def _accept_all(self, listening: socket.socket) -> None:
        listening.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                connection, _ = listening.accept()
                await asyncio.get_running_loop().connect_accepted_socket(self._protocol, connection)

    def _duplicates(self) -> list[socket.socket]:
        return [socket.socket(fileno=socket.dup(each.fileno())) for one in self.servers for each in one.sockets]

    def _protocol(self) -> asyncio.Protocol:
        return Protocol(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)


def serve(*, host: str, port: int, settings: ServiceSettings, reload: str | None = None) -> None:
    """Serve one instance until it is told to go.

    Args:
        host: the address to listen on.
        port: the port to listen on.
        settings: for how long to serve on.
        reload: a folder; a change of its code restarts the instance.
    """
    config = uvicorn.Config(
        "app.main:create_app",
        factory=True,
        host=host,
        port=port,
        loop="uvloop",
        http=Protocol,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        # Longer than NGINX keeps an idle connection (60 s): the side that sends requests must close first.
        timeout_keep_alive=75,
        timeout_graceful_shutdown=_FINISH,
        backlog=2048,
        reload=reload is not None,
        reload_dirs=[reload] if reload else None,
    )
    server = Server(config, serve_on=0 if reload else settings.drain_seconds)
    if reload:
        ChangeReload(config, target=server.run, sockets=[config.bind_socket()]).run()
    else:
        server.run()
