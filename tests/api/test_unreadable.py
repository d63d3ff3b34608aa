"""Bytes that are no HTTP request: they never become one, and get a problem all the same."""

import asyncio

import orjson
import pytest

from deploy.local.cluster import Cluster


@pytest.mark.sabotage("app/api/protocol.py", "def send_400_response(", "def _send_400_response(")
@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /api/v1/products HTTP/1.1\r\nHost: h\r\nX: \x01\r\n\r\n",
        b"FOO /api/v1/profiles HTTP/1.1\r\nHost: h\r\n\r\n",
    ],
    ids=["a control character in a header", "a method that does not exist"],
)
async def test_what_cannot_be_read_is_a_problem(cluster: Cluster, request_bytes: bytes) -> None:
    host, port = cluster.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(request_bytes)
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    size = int(head.partition("content-length: ")[2].split()[0])
    body = orjson.loads(await reader.readexactly(size))
    writer.close()
    await writer.wait_closed()
    assert head.startswith("http/1.1 4")
    assert "content-type: application/problem+json" in head
    assert body["request_id"] in head
    assert set(body) == {"type", "title", "status", "detail", "code", "request_id"}
