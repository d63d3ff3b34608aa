"""A door passes every byte on in order, whatever the weather, or says by a reset that something is lost."""

import asyncio
import os
import random
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest

from deploy.chaos.doors import LATENCY, Door, Weather


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while piece := await reader.read(10_000):
            writer.write(piece)
            await writer.drain()
    writer.close()


@pytest.fixture
async def door() -> AsyncIterator[Door]:
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    opened = await Door(lambda: port, random.Random(1)).open()
    yield opened
    opened.close()
    server.close()


async def enter(door: Door) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", door.port)


async def test_everything_passes_in_order_while_the_weather_changes(door: Door) -> None:
    reader, writer = await enter(door)
    sent = os.urandom(3_000_000)

    async def send() -> None:
        for start in range(0, len(sent), 100_000):
            await door.turn(random.choice((Weather.CLEAR, Weather.LATE)))
            writer.write(sent[start : start + 100_000])
            await writer.drain()
        writer.write_eof()

    sending = asyncio.create_task(send())
    async with asyncio.timeout(30):
        assert await reader.read() == sent
        await sending
    writer.close()


async def test_what_is_late_comes_later_by_both_ways(door: Door) -> None:
    reader, writer = await enter(door)
    await door.turn(Weather.LATE)
    loop = asyncio.get_running_loop()
    sent = loop.time()
    writer.write(b"hello")
    assert await reader.readexactly(5) == b"hello"
    assert loop.time() - sent >= 2 * LATENCY - 0.01
    writer.close()


async def test_a_silent_door_takes_everything_and_resets_what_has_lost_something(door: Door) -> None:
    reader, writer = await enter(door)
    quiet_reader, quiet_writer = await enter(door)
    for each, (read, write) in enumerate(((reader, writer), (quiet_reader, quiet_writer))):
        write.write(b"%d" % each)
        assert await read.readexactly(1) == b"%d" % each
    await door.turn(Weather.SILENT)
    writer.write(b"lost")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.read(1), 0.3)
    await door.turn(Weather.CLEAR)
    with pytest.raises(ConnectionResetError):
        await reader.read(1)
    quiet_writer.write(b"fine")
    assert await quiet_reader.readexactly(4) == b"fine"
    quiet_writer.close()


async def test_a_shut_door_refuses_and_opens_again_at_the_same_place(door: Door) -> None:
    reader, _ = await enter(door)
    port = door.port
    await door.turn(Weather.SHUT)
    with pytest.raises(ConnectionResetError):
        await reader.read(1)
    with pytest.raises(ConnectionRefusedError):
        await enter(door)
    await door.turn(Weather.CLEAR)
    assert door.port == port
    reader, writer = await enter(door)
    writer.write(b"again")
    assert await reader.readexactly(5) == b"again"
    writer.close()


async def test_a_door_that_cuts_ends_connections_in_the_middle(door: Door) -> None:
    await door.turn(Weather.CUTS)
    reader, writer = await enter(door)

    async def talk() -> None:
        while True:  # one piece of eight ends it; a hundred pass with a chance of one in 600,000
            writer.write(b"piece")
            await reader.readexactly(5)

    with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
        await asyncio.wait_for(talk(), 30)


async def test_a_server_that_is_away_is_a_reset() -> None:
    door = await Door(lambda: 1, random.Random(1)).open()
    reader, _ = await enter(door)
    with pytest.raises(ConnectionResetError):
        await reader.read(1)
    door.close()
