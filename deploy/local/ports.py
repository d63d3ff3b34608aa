"""Ports for servers: one port has one owner on this machine, from the moment it is chosen and not only once it listens.

A server binds its port seconds after the port was chosen, and again a second after it has died; who looked meanwhile
found it free. So whoever chooses a port claims it: it binds the UDP port of the same number, which nothing of ours
uses, which the kernel gives to one owner only, of whichever account, and which is free again when the owner ends.
"""

from __future__ import annotations

import os
import random
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

from deploy.local import ClusterError
from deploy.local.layout import HOST, Layout, Name, read_json, write_json

if TYPE_CHECKING:
    from collections.abc import Iterable

# Ports are searched below 32768, where Linux (and macOS, from 49152) starts to hand out ports to outgoing connections.
# A server's port in that range could be taken by a client while the server is restarting, and a client that retries
# a dead port there can even connect to itself.
FIRST_FREE_PORT, LAST_FREE_PORT = 20_000, 29_999

# Tried first, so that addresses in notes and shells stay the same from day to day.
USUAL_PORTS = {
    "primary": 15432,
    "replica": 15433,
    "redis": 16379,
    "api": 18001,
    "payments": 18100,
    "relay": 18201,
    "worker": 18301,
    "smtp": 18025,
    "smtp-http": 18026,
    "switchboard": 18400,
}
# A primary and at most eight replicas, and the numbers stay round.
PORTS_OF_A_SHARD = 10


class Claims:
    """Ports that are claimed until `release`, or until the last process that has inherited `descriptors` ends."""

    def __init__(self) -> None:
        """Claim nothing yet."""
        self._held: dict[int, int] = {}

    @property
    def descriptors(self) -> list[int]:
        """What a process has to inherit to have the claims too."""
        return list(self._held.values())

    def take(self, port: int) -> bool:
        """Claim `port` if no server listens there and nobody else has claimed it; False if one does or has."""
        if port in self._held or not port_is_free(port):
            return False
        claim = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            claim.bind((HOST, port))
        except OSError:
            claim.close()
            return False
        self._held[port] = claim.detach()
        return True

    def take_any(self) -> int:
        """Claim a port that no connection of anybody's gets from the kernel meanwhile, and return it."""
        while not self.take(port := random.randint(FIRST_FREE_PORT, LAST_FREE_PORT)):
            pass
        return port

    def release(self) -> None:
        """Give up our hold; a process that was handed the descriptors goes on holding them."""
        while self._held:
            os.close(self._held.popitem()[1])


_OF_THIS_PROCESS = Claims()


def free_port() -> int:
    """Return a port that is nobody's but this process's, as long as it lives."""
    return _OF_THIS_PROCESS.take_any()


def choose_ports(layout: Layout, names: Iterable[str], claims: Claims, *, usual: bool) -> dict[str, int]:
    """Claim a port for each of `names` (`primary`, `api-2`, …): the last start's, the usual one, or any.

    `usual=False` skips the usual ones, so that clusters of tests stay out of the way of a person's.
    """
    last: dict[str, int] = {}
    with suppress(FileNotFoundError, ClusterError):  # nobody needs the same ports as before
        last = read_json(layout.ports)
    chosen: dict[str, int] = {}
    for name in names:
        part = Name.of(name)
        candidates = [last[name]] if name in last else []
        if usual:
            candidates.append(USUAL_PORTS[part.kind] + PORTS_OF_A_SHARD * part.shard + part.number - 1)
        chosen[name] = next(filter(claims.take, candidates), None) or claims.take_any()
    write_json(layout.ports, last | chosen)
    return chosen


def port_is_free(port: int) -> bool:
    """Whether a server could listen on `port` of 127.0.0.1 now."""
    with socket.socket() as probe:
        # A port whose last connections are only waiting out their time is free for a server.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
            probe.listen(1)
        except OSError:
            return False
    return True
