"""Doors: TCP proxies before the servers of a cluster, through which a network can be made to misbehave.

A door passes everything on as it is until it is told otherwise: later, with connections cut, or not at all. It never
changes a byte and never reorders: what a slow, flaky or silent network does, and nothing else.
"""

import asyncio
import random
import socket
import struct
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from enum import StrEnum
from typing import Self, cast

from deploy.local.layout import HOST

# Seconds by which LATE delays each direction. A round trip, 0.2 s, stays below what a watcher of a database waits for
# (0.6 s): the server counts as alive and everybody suffers, which is the harder case. An instance's patience with Redis
# (0.25 s) is just kept or just not.
LATENCY = 0.1
# Of the pieces that pass while a door CUTS, one in so many ends its connection; a request is a few pieces.
CUT_ONE_IN = 8
# SO_LINGER with no time: closing sends RST, as a firewall or a crashed host does, instead of an orderly FIN.
_RESET = struct.pack("ii", 1, 0)


class Weather(StrEnum):
    """What a door does with what passes."""

    CLEAR = "passes on"
    LATE = "passes on late"
    CUTS = "cuts connections"
    SILENT = "takes everything and passes nothing on"
    SHUT = "refuses connections"


class Door:
    """One proxy. `port` is where clients find it; `target` says the port behind it at the moment of a connection.

    Args:
        target: the port of the server.
        chance: decides which connections are cut.
    """

    def __init__(self, target: Callable[[], int], chance: random.Random) -> None:
        self._target = target
        self._chance = chance
        self._server: asyncio.Server | None = None
        self._connecting: set[asyncio.Task[None]] = set()
        self.weather = Weather.CLEAR
        self.sides: set[_Side] = set()
        self.port = 0

    async def open(self) -> Self:
        """Listen, at first on any free port and later on the same."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Side(self, None), HOST, self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def turn(self, weather: Weather) -> None:
        """Behave like that from now on; connections that have lost something by the old weather are reset."""
        before, self.weather = self.weather, weather
        if before is Weather.SHUT and weather is not Weather.SHUT:
            await self.open()
        if weather is Weather.SHUT:
            self.close()
        for side in [side for side in self.sides if side.has_lost]:
            side.cut()

    def close(self) -> None:
        """Listen no more, and cut what is open."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for side in tuple(self.sides):
            side.cut()

    def cuts_now(self) -> bool:
        """Say whether the piece at hand ends its connection."""
        return self.weather is Weather.CUTS and not self._chance.randrange(CUT_ONE_IN)

    def connect(self, client: "_Side") -> None:
        """Connect to the server for a client that has come in."""
        task = asyncio.create_task(self._connect(client))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    async def _connect(self, client: "_Side") -> None:
        try:
            await asyncio.get_running_loop().create_connection(lambda: _Side(self, client), HOST, self._target())
        except OSError:
            client.cut()


class _Side(asyncio.Protocol):
    """One end of a connection through a door: what it receives leaves at the other end, as the weather says."""

    def __init__(self, door: Door, other: "_Side | None") -> None:
        self._door = door
        self._other = other
        self._transport: asyncio.Transport
        self._late: deque[tuple[float, bytes]] = deque()
        self._ends = False
        self.has_lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Find the other end: the server's is made for the client's, which waits for it."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's own is no subclass of it
        self._door.sides.add(self)
        if self._other is None:
            self._transport.pause_reading()
            self._door.connect(self)
        else:
            self._other.meet(self)

    def meet(self, server: "_Side") -> None:
        """Begin to read: the server is there. A client that has gone meanwhile takes it along."""
        self._other = server
        if self._transport.is_closing():
            server.cut()
        else:
            self._transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        """Pass a piece on."""
        if self._door.weather is Weather.SILENT:
            self.has_lost = True
        elif self._door.cuts_now():
            self.cut()
        else:
            self._pass(data)

    def eof_received(self) -> bool:
        """Pass the end on, after what came before it; the other direction stays."""
        if self._door.weather is Weather.SILENT:
            self.has_lost = True
        else:
            self._pass(b"")
        return True

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's
        """Take the other end along."""
        self._door.sides.discard(self)
        if self._other is not None:
            self._other.cut()

    def pause_writing(self) -> None:
        """Have the other end read no more until this one has sent what it has."""
        if self._other is not None:
            self._other.hold(reading=False)

    def resume_writing(self) -> None:
        """Have the other end read on."""
        if self._other is not None:
            self._other.hold(reading=True)

    def hold(self, *, reading: bool) -> None:
        """Read on, or not."""
        if self._transport.is_closing():
            return
        if reading:
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()

    def send(self, data: bytes) -> None:
        """Send what came in at the other end; nothing at all is its end."""
        if self._transport.is_closing():
            return
        if data:
            self._transport.write(data)
        else:
            with suppress(OSError):  # the peer has reset the connection, and this end has not heard of it yet
                self._transport.write_eof()

    def cut(self) -> None:
        """Reset this end, and with it the other."""
        with suppress(OSError):
            self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self._transport.abort()

    def _pass(self, data: bytes) -> None:
        other, late = self._other, self._door.weather is Weather.LATE
        if other is None:  # it is read only once the server is there
            return
        if not late and not self._late:
            other.send(data)
            return
        loop = asyncio.get_running_loop()
        due = loop.time() + (LATENCY if late else 0.0)
        self._late.append((due, data))
        if len(self._late) == 1:
            loop.call_at(due, self._pass_late)

    def _pass_late(self) -> None:
        loop = asyncio.get_running_loop()
        while self._late and self._other is not None and self._late[0][0] <= loop.time():
            self._other.send(self._late.popleft()[1])
        if self._late:
            loop.call_at(self._late[0][0], self._pass_late)
