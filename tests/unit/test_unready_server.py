"""A server that refuses connections because it starts or stops is lost for now; it is no mistake of whoever asks."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from app.core.settings import DatabaseSettings
from app.scaling import dialect
from app.scaling.dialect import Trouble

ASKS_FOR_TLS = 8  # bytes
SAID = b"SFATAL\0C57P03\0Mthe database system is starting up\0\0"


@pytest.fixture
async def starting() -> AsyncIterator[AsyncEngine]:
    """An engine of a server that says what PostgreSQL says while it starts; a real one is ready too soon."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(ASKS_FOR_TLS)
        writer.write(b"N")
        await reader.readexactly(int.from_bytes(await reader.readexactly(4), "big") - 4)  # who connects, to what
        writer.write(b"E" + (len(SAID) + 4).to_bytes(4, "big") + SAID)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        engine = dialect.create_engine(
            f"postgresql://nobody@127.0.0.1:{port}/nothing", DatabaseSettings(), autocommit=False, name="tests"
        )
        yield engine
        await engine.dispose()


@pytest.mark.sabotage("app/scaling/dialect/postgresql.py", "if trouble(error) is not Trouble.LOST:", "if True:")
async def test_a_server_that_is_starting_is_lost_for_now_however_a_connection_is_asked_for(
    starting: AsyncEngine,
) -> None:
    for ask in (starting.raw_connection, starting.connect):
        with pytest.raises(dialect.ERRORS) as refusal:
            await ask()
        assert dialect.trouble(refusal.value) is Trouble.LOST
