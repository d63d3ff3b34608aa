"""What instances keep in their own memory: dropped everywhere before a write returns, never used without pushes."""

import asyncio
from time import monotonic
from uuid import uuid4

import pytest
from conftest import PATIENCE, until
from quiet import Servers

from app.scaling import near as room
from app.scaling.cache import PROFILE, Entry
from app.scaling.near import LEASE
from app.wiring import Resources

pytest_plugins = ("quiet",)


def version(number: int) -> Entry:
    return Entry(number, f'{{"version":{number}}}'.encode())


async def unused() -> Entry:
    raise AssertionError("this must have come from the cache")


@pytest.fixture
async def key(quiet: Resources, other: Resources) -> str:
    """A key that two instances with trusted memories have at hand at its first version."""
    made = uuid4().hex

    async def both_trust() -> bool:
        return quiet.near.trusted() and other.near.trusted()

    async def both_keep() -> bool:
        await until(both_trust)
        for instance in (quiet, other):
            await instance.cache.read(PROFILE, made, unused)
        return bool(quiet.cache.kept(PROFILE, made) and other.cache.kept(PROFILE, made))

    await until(both_trust)
    await quiet.cache.put(PROFILE, made, version(1))
    await until(both_keep)
    return made


@pytest.mark.sabotage(path="app/scaling/cache.py", take_out="        await self._near.told(name)\n", put="")
async def test_once_a_write_returns_no_instance_answers_with_what_was_before(
    quiet: Resources, other: Resources, key: str
) -> None:
    for number in range(2, 200):
        writer, reader = (quiet, other) if number % 2 else (other, quiet)
        await writer.cache.put(PROFILE, key, version(number))
        assert await reader.cache.read(PROFILE, key, unused) == version(number)
        assert await writer.cache.read(PROFILE, key, unused) == version(number)


@pytest.mark.sabotage(
    path="app/scaling/near.py",
    take_out="            async with asyncio.timeout(LEASE):\n                for _ in range(listeners):",
    put="            async with asyncio.timeout(0):\n                for _ in range(listeners):",
)
async def test_an_instance_that_hears_nothing_may_not_use_its_memory_once_the_write_returns(
    quiet: Resources, other: Resources, key: str
) -> None:
    # Its listener hangs: what is pushed to it stays unread.
    listening = other.near._listening
    assert listening is not None
    listening.cancel()
    await asyncio.wait({listening})
    deaf = other.redis.client.pubsub()
    await deaf.subscribe(room.CHANNEL)
    try:
        started = monotonic()
        async with asyncio.timeout(PATIENCE):
            await quiet.cache.put(PROFILE, key, version(2))
        assert monotonic() - started > LEASE
        assert other.cache.kept(PROFILE, key) is None
        assert await other.cache.read(PROFILE, key, unused) == version(2)
    finally:
        await deaf.aclose()  # type: ignore[no-untyped-call]
        await other.near.start()


@pytest.mark.sabotage(
    path="app/scaling/near.py", take_out="if epoch != self.epoch or not self.trusted():", put="if not self.trusted():"
)
async def test_what_was_read_before_a_write_is_not_kept_after_it(quiet: Resources, other: Resources, key: str) -> None:
    epoch = quiet.near.epoch
    await other.cache.put(PROFILE, key, version(2))
    quiet.cache.found(PROFILE, key, b'1,9999999999999,1:{"version":1}', epoch)
    assert await quiet.cache.read(PROFILE, key, unused) == version(2)


@pytest.mark.sabotage(
    path="app/scaling/cache.py",
    take_out="                await self._near.told(_local(kind, key))\n",
    put="                pass\n",
)
async def test_who_finds_something_newer_than_the_cache_has_no_instance_show_the_old_one_any_more(
    quiet: Resources, other: Resources, key: str
) -> None:
    async def newer() -> Entry:
        return version(2)

    assert await quiet.cache.read_past(PROFILE, key, newer) == version(2)
    assert await other.cache.read(PROFILE, key, unused) == version(2)


@pytest.mark.sabotage(
    path="app/scaling/cache.py",
    take_out="self._near.keep(name, held.entry, epoch, held.seconds_left())",
    put="self._near.keep(name, held.entry, epoch)",
)
async def test_what_redis_does_not_hold_any_more_is_not_at_hand(quiet: Resources, key: str) -> None:
    # 1 ms into the epoch: it has expired.
    quiet.cache.found(PROFILE, key, b'1,1,1:{"version":1}', quiet.near.epoch, unused)
    assert quiet.cache.kept(PROFILE, key) is None


async def test_without_redis_nothing_at_hand_is_used_for_longer_than_the_lease(
    quiet: Resources, servers: Servers, key: str
) -> None:
    async def distrusts() -> bool:
        return not quiet.near.trusted()

    async with servers.down("redis"):
        assert quiet.near._trusted_until < monotonic() + LEASE
        await until(distrusts)
        assert quiet.cache.kept(PROFILE, key) is None
    await until(quiet.redis.client.ping)


@pytest.mark.sabotage(path="app/scaling/near.py", take_out="if len(self._entries) > self._most:", put="if False:")
async def test_what_is_at_hand_is_bounded(quiet: Resources, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quiet.near, "_most", 10)

    async def keeps_the_last() -> bool:  # whenever it trusts its memory, which on a busy machine is not always
        for number in range(50):
            quiet.near.keep(f"bound:{number}", number, quiet.near.epoch)
        return bool(quiet.near.get("bound:49") == 49)

    await until(keeps_the_last)
    assert len(quiet.near._entries) <= 11
    assert quiet.cache.kept(PROFILE, key) is None
