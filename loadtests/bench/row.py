"""The limit of an uncached read: a bare ASGI program that answers each request with one row of PostgreSQL by asyncpg.

It routes nothing, knows no caller, limits, counts and logs nothing, and asks the statement that the service asks.
"""

import os
from typing import Any
from uuid import UUID

import asyncpg

from app.core import wire

_COLUMNS = "profile_id, name, bio, tier, avatar_key, version, created_at, updated_at"
_STATEMENT = f"SELECT {_COLUMNS} FROM profiles WHERE profile_id = $1 AND erased_at IS NULL"  # noqa: S608  # fixed text
# As many connections as the service has.
_CONNECTIONS = 5
_START = {"type": "http.response.start", "status": 200}
_pool: Any = None


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Answer any request with the row of the id that its path ends with."""
    if scope["type"] != "http":
        await _lifespan(receive, send)
        return
    if scope["path"] == "/":
        await send({**_START, "headers": []})
        await send({"type": "http.response.body", "body": b""})
        return
    row = await _pool.fetchrow(_STATEMENT, UUID(scope["path"].rpartition("/")[2]))
    body = wire.encode(dict(row))
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({**_START, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _lifespan(receive: Any, send: Any) -> None:
    global _pool  # noqa: PLW0603  # opened when the server starts, for its one process
    while True:
        message = await receive()
        if message["type"] == "lifespan.startup":
            _pool = await asyncpg.create_pool(os.environ["DATABASE_URL"], min_size=_CONNECTIONS, max_size=_CONNECTIONS)
        else:
            await _pool.close()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
