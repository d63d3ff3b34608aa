"""A server that refuses connections because it starts or stops is lost for now; it is no mistake of whoever asks."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from app.core.settings import DatabaseSettings
from app.scaling import dialect
from app.scaling.dialect import Trouble

ASKS_FOR_TLS = 8  # bytes
STARTS = "C57P03", "Mthe database system is starting up"
BROKEN = [
    ("C3D000", 'Mdatabase "scaleout" does not exist'),
    ("C22023", 'M"base/16387" is not a valid data directory'),
    ("C58P01", 'Mcould not open file "base/16387/2663": No such file or directory'),
    ("CXX001", "Minvalid page in block 0 of relation base/16387/1259"),
    ("C53200", "Mout of memory"),
]


@asynccontextmanager
async def refusing(*said: str) -> AsyncIterator[AsyncEngine]:
    """Yield an engine of a server that answers every connection with an error; a real one does it too seldom."""
    fields = "".join(f"{field}\0" for field in ("SFATAL", *said)).encode() + b"\0"

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(ASKS_FOR_TLS)
        writer.write(b"N")
        await reader.readexactly(int.from_bytes(await reader.readexactly(4), "big") - 4)  # who connects, to what
        writer.write(b"E" + (len(fields) + 4).to_bytes(4, "big") + fields)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        engine = dialect.create_engine(
            f"postgresql://nobody@127.0.0.1:{port}/nothing", DatabaseSettings(), autocommit=False, name="tests"
        )
        try:
            yield engine
        finally:
            await engine.dispose()


async def check_lost(engine: AsyncEngine) -> None:
    """Ask for connections in both ways, and expect to be told that the server is lost."""
    for ask in (engine.raw_connection, engine.connect):
        with pytest.raises(dialect.ERRORS) as refusal:
            await ask()
        assert dialect.trouble(refusal.value) is Trouble.LOST


@pytest.mark.sabotage(
    "app/scaling/dialect/postgresql.py",
    "if isinstance(error, asyncpg.InterfaceError) and trouble(error) is not Trouble.LOST:",
    "if True:",
)
async def test_a_server_that_is_starting_is_lost_for_now_however_a_connection_is_asked_for() -> None:
    async with refusing(*STARTS) as engine:
        await check_lost(engine)


@pytest.mark.sabotage(
    "app/scaling/dialect/postgresql.py",
    "if isinstance(error, asyncpg.InterfaceError) and trouble(error) is not Trouble.LOST:",
    "if trouble(error) is not Trouble.LOST:",
)
@pytest.mark.parametrize("said", BROKEN, ids=[code for code, _ in BROKEN])
async def test_a_server_that_has_lost_its_files_is_lost_too(said: tuple[str, str]) -> None:
    async with refusing(*said) as engine:
        await check_lost(engine)


@pytest.mark.sabotage("app/scaling/dialect/postgresql.py", "            asyncpg.PostgresSystemError,\n", "")
@pytest.mark.parametrize(
    "error",
    [
        asyncpg.UndefinedFileError,
        asyncpg.PostgresIOError,
        asyncpg.DataCorruptedError,
        asyncpg.OutOfMemoryError,
        asyncpg.DiskFullError,
        asyncpg.TooManyConnectionsError,
    ],
)
def test_a_statement_that_meets_a_broken_disk_is_no_wrong_statement(error: type[asyncpg.PostgresError]) -> None:
    assert dialect.trouble(error("could not read block 0")) is Trouble.LOST
