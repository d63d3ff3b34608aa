"""A proxy in front of PostgreSQL that notes what clients send: round trips and statements, whatever a driver reports.

It forwards every byte as it is. (PYTEST_DONT_REWRITE: nothing is asserted here.)
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit


@dataclass
class Wire:
    """A proxy in front of a node, in PostgreSQL's protocol.

    Attributes:
        sent: how many messages of each type clients have sent.
        statements: the texts that they have sent, each once, however often it is run.
    """

    port: int
    sent: Counter[str] = field(default_factory=Counter)
    statements: set[str] = field(default_factory=set)

    @classmethod
    @asynccontextmanager
    async def to(cls, url: str) -> AsyncIterator["Wire"]:
        """Listen on a free port in front of the node at `url`."""
        parts = urlsplit(url)
        wire = cls(0)
        tasks: set[asyncio.Task[None]] = set()

        async def serve(client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
            node, to_node = await asyncio.open_connection(parts.hostname, parts.port)
            for work in (wire._requests(client, to_node), wire._answers(node, to_client)):
                tasks.add(asyncio.create_task(work))

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        wire.port = server.sockets[0].getsockname()[1]
        try:
            yield wire
        finally:
            server.close()
            await asyncio.gather(*tasks)

    @property
    def round_trips(self) -> int:
        """How often a client has asked and waited: each sync, flush or simple query is one answer to wait for."""
        return self.sent["S"] + self.sent["H"] + self.sent["Q"]

    def instead_of(self, url: str) -> str:
        """Return the URL that leads to the node at `url` through here."""
        parts = urlsplit(url)
        return parts._replace(netloc=parts.netloc.replace(f":{parts.port}", f":{self.port}")).geturl()

    async def _requests(self, client: asyncio.StreamReader, node: asyncio.StreamWriter) -> None:
        first = True
        with suppress(asyncio.IncompleteReadError, ConnectionResetError):
            while True:
                kind = b"" if first else await client.readexactly(1)
                length = await client.readexactly(4)
                body = await client.readexactly(int.from_bytes(length) - 4)
                # The first message has no type, and a client may ask for TLS with 80877103 before it.
                first = first and int.from_bytes(body[:4]) == 80877103
                self.sent[kind.decode()] += 1
                if kind == b"P":  # parse: a name, the text, the types of its parameters
                    self.statements.add(body.split(b"\0")[1].decode())
                elif kind == b"Q":
                    self.statements.add(body.rstrip(b"\0").decode())
                node.write(kind + length + body)
                await node.drain()
        node.close()

    async def _answers(self, node: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        with suppress(ConnectionResetError):
            while data := await node.read(65536):
                client.write(data)
                await client.drain()
        client.close()
