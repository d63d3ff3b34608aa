"""Side a, the limit of the network way: a bare ASGI program that answers each request with one GET from Redis.

It routes nothing, knows no caller, limits, counts and logs nothing: whatever asks Redis once a request cannot be faster
with this server and this client library.
"""

import os
from typing import Any

from redis.asyncio import BlockingConnectionPool, Redis

from loadtests.bench import KEY

# As many connections as this service would have; whoever finds none free waits.
_pool = BlockingConnectionPool.from_url(os.environ["REDIS_URL"], protocol=3, max_connections=64, timeout=None)
_client = Redis(connection_pool=_pool)
_START = {"type": "http.response.start", "status": 200}


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Answer any request with the bytes of the profile."""
    if scope["type"] != "http":
        await _lifespan(receive, send)
        return
    body: Any = await _client.get(KEY)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({**_START, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _lifespan(receive: Any, send: Any) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            await _client.aclose()
            return
