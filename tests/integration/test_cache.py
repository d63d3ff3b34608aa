"""The cache over two instances: newer wins, a deletion stays one, one loader a key, and Redis may be away."""

import asyncio
from collections.abc import Awaitable, Callable
from time import time
from uuid import uuid4

import pytest
from conftest import PATIENCE, until
from quiet import Servers, stranger

from app.core import context
from app.core.context import NEWEST
from app.core.telemetry import CACHE_READS
from app.scaling import cache as room
from app.scaling import values
from app.scaling.cache import ABSENT, NEGATIVE_TTL, PROFILE, Cache, Entry
from app.scaling.debts import REPAY_EVERY
from app.wiring import Resources

pytest_plugins = ("quiet",)


class Loader:
    """A source that counts how often it is asked and answers when it is let."""

    def __init__(self, entry: Entry, *, ready: bool = True) -> None:
        self.entry = entry
        self.loads = 0
        self.asked = asyncio.Event()
        self.ready = asyncio.Event()
        if ready:
            self.ready.set()

    async def __call__(self) -> Entry:
        self.loads += 1
        self.asked.set()
        await self.ready.wait()
        return self.entry


async def unused() -> Entry:
    raise AssertionError("this must have come from the cache")


def version(number: int) -> Entry:
    return Entry(number, f'{{"version":{number}}}'.encode())


@pytest.fixture
def key() -> str:
    """A key that no other test has."""
    return uuid4().hex


@pytest.fixture
def long_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who loads has a lease that no machine is too slow for."""
    for owner in (room, values):
        monkeypatch.setattr(owner, "LEASE_MILLISECONDS", int(1000 * PATIENCE))


async def test_what_one_instance_caches_another_finds(quiet: Resources, other: Resources, key: str) -> None:
    loader = Loader(version(1))
    assert await quiet.cache.read(PROFILE, key, loader) == version(1)
    assert await other.cache.read(PROFILE, key, unused) == version(1)
    assert (loader.loads, context.current().spans["cache"].description) == (1, "l2")


@pytest.mark.sabotage(
    path="app/scaling/values.py", take_out="  if version > tonumber(ARGV[1]) then return held end\n", put=""
)
async def test_a_slow_loader_cannot_bring_back_an_old_value(quiet: Resources, other: Resources, key: str) -> None:
    slow = Loader(version(1), ready=False)
    reading = asyncio.create_task(quiet.cache.read(PROFILE, key, slow))
    await slow.asked.wait()
    await other.cache.put(PROFILE, key, version(2))
    slow.ready.set()
    assert await reading == version(2)
    assert await quiet.cache.read(PROFILE, key, unused) == version(2)


async def test_a_deletion_is_not_undone_by_a_reader_of_the_state_before(
    quiet: Resources, other: Resources, key: str
) -> None:
    await quiet.cache.put(PROFILE, key, version(1))
    slow = Loader(version(1), ready=False)
    await quiet.redis.client.delete(quiet.cache.names_of(PROFILE, key)[0])
    reading = asyncio.create_task(other.cache.read(PROFILE, key, slow))
    await slow.asked.wait()
    await quiet.cache.put(PROFILE, key, Entry(2, None))
    slow.ready.set()
    assert (await reading).body is None
    assert (await quiet.cache.read(PROFILE, key, unused)).body is None


@pytest.mark.parametrize("numbers", [(1, 2, 3), (3, 2, 1), (2, 3, 1), (9, 10, 2)])
async def test_the_newest_of_any_order_of_writes_stands(quiet: Resources, key: str, numbers: tuple[int, ...]) -> None:
    for number in numbers:
        assert (await quiet.cache.put(PROFILE, key, version(number))).version >= number
    assert await quiet.cache.read(PROFILE, key, unused) == version(max(numbers))


@pytest.mark.sabotage(
    path="app/scaling/values.py",
    take_out="kind.ttl if entry.body is not None or entry.version else NEGATIVE_TTL",
    put="kind.ttl",
)
async def test_an_unknown_id_is_remembered_briefly_and_gives_way_to_the_first_version(
    quiet: Resources, key: str
) -> None:
    loader = Loader(ABSENT)
    for _ in range(3):
        assert (await quiet.cache.read(PROFILE, key, loader)).body is None
    assert loader.loads == 1
    assert 0 < await quiet.redis.client.pttl(quiet.cache.names_of(PROFILE, key)[0]) <= NEGATIVE_TTL * 1000
    await quiet.cache.put(PROFILE, key, version(1))
    assert await quiet.cache.read(PROFILE, key, unused) == version(1)


async def test_values_live_as_long_as_their_kind_less_some_jitter(quiet: Resources) -> None:
    left = []
    for _ in range(30):
        key = uuid4().hex
        await quiet.cache.put(PROFILE, key, version(1))
        left.append(await quiet.redis.client.pttl(quiet.cache.names_of(PROFILE, key)[0]))
    assert all(0.89 * 300_000 < each <= 300_000 for each in left)
    assert len(set(left)) > 5


@pytest.mark.sabotage(
    path="app/scaling/cache.py",
    take_out="(loading := self._loading.get(flight)) is not None",
    put="(loading := self._loading.get(key)) is not None",
)
async def test_a_hundred_readers_of_one_missing_key_load_it_once(quiet: Resources, key: str) -> None:
    loader, misses = Loader(version(1), ready=False), CACHE_READS.labels(PROFILE.name, "miss")._value
    before = misses.get()

    async def all_missed() -> bool:
        return bool(misses.get() == before + 100)

    readers = [asyncio.create_task(quiet.cache.read(PROFILE, key, loader)) for _ in range(100)]
    await until(all_missed)
    loader.ready.set()
    assert await asyncio.gather(*readers) == [version(1)] * 100
    assert loader.loads == 1


async def test_readers_that_must_see_different_positions_do_not_share_a_load(quiet: Resources, key: str) -> None:
    early = Loader(version(1), ready=False)
    stale = asyncio.create_task(quiet.cache.read(PROFILE, key, early))
    await early.asked.wait()
    with context.working(stranger()) as work:
        work.reached(0, 4711)
        assert await quiet.cache.read(PROFILE, key, Loader(version(2))) == version(2)
    early.ready.set()
    assert await stale == version(2)


@pytest.mark.sabotage(
    path="app/scaling/cache.py",
    take_out="        except asyncio.CancelledError:\n            loading.set_result(None)\n",
    put="        except asyncio.CancelledError:\n            loading.cancel()\n",
)
async def test_a_reader_that_goes_away_leaves_the_load_to_one_of_those_who_wait(quiet: Resources, key: str) -> None:
    loader, misses = Loader(version(1), ready=False), CACHE_READS.labels(PROFILE.name, "miss")._value
    leaving = asyncio.create_task(quiet.cache.read(PROFILE, key, loader))
    await loader.asked.wait()
    before = misses.get()

    async def all_missed() -> bool:
        return bool(misses.get() == before + 10)

    staying = [asyncio.create_task(quiet.cache.read(PROFILE, key, loader)) for _ in range(10)]
    await until(all_missed)
    leaving.cancel()
    await asyncio.wait({leaving})
    loader.ready.set()
    assert await asyncio.gather(*staying) == [version(1)] * 10
    assert loader.loads == 2
    assert not quiet.cache._loading


async def test_a_load_that_fails_is_told_and_tried_anew_by_the_next_reader(quiet: Resources, key: str) -> None:
    async def fail() -> Entry:
        raise ValueError("no answer")

    with pytest.raises(ValueError, match="no answer"):
        await quiet.cache.read(PROFILE, key, fail)
    assert await quiet.cache.read(PROFILE, key, Loader(version(1))) == version(1)


async def test_without_redis_every_read_loads_and_afterwards_none_does(
    quiet: Resources, servers: Servers, key: str
) -> None:
    loader = Loader(version(1))
    async with servers.down("redis"):
        for _ in range(5):
            assert await quiet.cache.read(PROFILE, key, loader) == version(1)
        assert context.current().spans["cache"].description == "bypass"
        assert await quiet.cache.put(PROFILE, key, version(2)) == version(2)
        assert await quiet.cache.generations(["a", "b"]) == [0, 0]
        await quiet.cache.raise_generation("a", 1)
    assert loader.loads == 5
    await quiet.cache.read(PROFILE, key, loader)
    assert await quiet.cache.read(PROFILE, key, unused) in (version(1), version(2))


@pytest.mark.sabotage(
    path="app/scaling/cache.py", take_out="            self._debts.owe(_local(kind, key), again)\n", put=""
)
async def test_a_write_that_redis_did_not_hear_of_is_told_within_2_s_of_its_return(
    quiet: Resources, other: Resources, servers: Servers, key: str
) -> None:
    await quiet.cache.put(PROFILE, key, version(1))
    async with servers.frozen("redis"):
        # The first call runs into its timeout, and may still reach Redis; from then on nothing is sent.
        await quiet.cache.put(PROFILE, f"{key}-first", version(1))
        await quiet.cache.put(PROFILE, key, version(2))
    # It is told again and again, several times in the 2 s; how long that takes on a busy machine is not the question.
    assert REPAY_EVERY < 2 / 4
    await until(_reads, other, key, version(2))


@pytest.mark.sabotage(
    path="app/scaling/values.py", take_out='name = f"{tagged}:{self._pipe.run_of(tagged)}"', put="name = tagged"
)
async def test_what_a_redis_held_before_it_went_is_never_asked_for(
    quiet: Resources, other: Resources, servers: Servers, key: str
) -> None:
    await quiet.cache.put(PROFILE, key, version(1))
    async with servers.down("redis"):
        pass  # meanwhile an instance has written version 2, and has died before Redis came back
    assert await quiet.redis.client.keys(f"profile:{{{key}}}*")
    assert await other.cache.read(PROFILE, key, Loader(version(2))) == version(2)
    assert await quiet.cache.read(PROFILE, key, unused) == version(2)


async def _reads(instance: Resources, key: str, expected: Entry) -> bool:
    return await instance.cache.read(PROFILE, key, Loader(expected)) == expected and bool(
        await instance.redis.client.exists(instance.cache.names_of(PROFILE, key)[0])
    )


@pytest.mark.sabotage(
    path="app/scaling/cache.py", take_out="if held.due() and name not in self._early:", put="if False:"
)
async def test_a_value_is_loaded_again_before_it_expires_while_its_readers_do_not_wait(
    quiet: Resources, other: Resources, key: str
) -> None:
    name, loader = quiet.cache.names_of(PROFILE, key)[0], Loader(version(2), ready=False)
    # It expires in a minute, and loading it is known to take hours: every reader is early.
    raw = b'1,%d,%d:{"version":1}' % ((time() + 60) * 1000, 10**10)
    await quiet.redis.client.set(name, raw, ex=60)
    for _ in range(50):
        for instance in (quiet, other):
            instance.near.drop(f"profile:{key}")
            assert await instance.cache.read(PROFILE, key, loader) == version(1)
    async with asyncio.timeout(PATIENCE):
        await loader.asked.wait()
    loader.ready.set()
    await until(_reads, other, key, version(2))
    assert loader.loads == 1


@pytest.mark.sabotage(path="app/scaling/cache.py", take_out="if tonumber(ARGV[1]) > held then", put="if true then")
async def test_a_generation_only_grows(quiet: Resources, other: Resources, key: str) -> None:
    for position in (5, 9, 7):
        await quiet.cache.raise_generation(key, position)
    assert await other.cache.generations([key, f"{key}-none"]) == [9, 0]


@pytest.mark.sabotage(path="app/scaling/cache.py", take_out="if position >= NEWEST:", put="if position < 0:")
async def test_a_commit_of_unknown_position_does_not_send_every_list_to_the_primary(quiet: Resources, key: str) -> None:
    await quiet.cache.raise_generation(key, NEWEST)
    assert await quiet.cache.generations([key]) == [0]


async def test_any_kind_of_bytes_comes_back_as_it_was(quiet: Resources, key: str) -> None:
    put: Callable[[Entry], Awaitable[Entry]] = lambda entry: Cache(quiet.pipe, quiet.near).put(PROFILE, key, entry)  # noqa: E731
    for number, body in enumerate((b"{}", b"1:2:3", b"\x00\xff:", '{"name":"Zoë 🙂"}'.encode()), start=1):
        await put(Entry(number, body))
        assert await quiet.cache.read(PROFILE, key, unused) == Entry(number, body)


@pytest.mark.sabotage(
    path="app/scaling/values.py",
    take_out="return held if isinstance(held, bytes) else bool(held)",
    put="return held if isinstance(held, bytes) else True",
)
@pytest.mark.usefixtures("long_lease")
async def test_500_readers_of_one_cold_key_on_two_instances_load_it_once(
    quiet: Resources, other: Resources, key: str
) -> None:
    loader, misses = Loader(version(1), ready=False), CACHE_READS.labels(PROFILE.name, "miss")._value
    before = misses.get()

    async def all_missed() -> bool:
        return bool(misses.get() == before + 500)

    readers = [
        asyncio.create_task((quiet, other)[number % 2].cache.read(PROFILE, key, loader)) for number in range(500)
    ]
    await until(all_missed)
    assert await other.redis.client.exists(other.cache.names_of(PROFILE, key)[1])
    loader.ready.set()
    assert await asyncio.gather(*readers) == [version(1)] * 500
    assert loader.loads == 1
    assert not await other.redis.client.exists(other.cache.names_of(PROFILE, key)[1])


@pytest.mark.sabotage(
    path="app/scaling/cache.py",
    take_out="            self._leased.add(flight)\n        while",
    put="            pass\n        while",
)
@pytest.mark.usefixtures("long_lease")
async def test_who_has_the_lease_does_not_wait_behind_those_who_wait_for_it(quiet: Resources, key: str) -> None:
    """Of two that miss a key the one without the lease may come first to where it is loaded."""
    loader = Loader(version(1))
    held, lease = quiet.cache.names_of(PROFILE, key)
    await quiet.redis.client.set(lease, 1)  # the caller's, who is held up; without its word nobody else ever loads
    waiting = asyncio.create_task(quiet.cache.read(PROFILE, key, loader))

    async def waits() -> bool:
        return f"profile:{key}@" in quiet.cache._loading

    await until(waits)
    async with asyncio.timeout(PATIENCE / 2):
        assert await quiet.cache.load(PROFILE, key, loader, leased=True) == version(1)
    assert await waiting == version(1)
    assert loader.loads == 1
    assert await quiet.redis.client.exists(held, lease) == 1
