"""Which replica answers: one that has replayed what the caller must see, the less busy of two, never an ill one."""

import asyncio
from collections import Counter
from typing import Any

import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.settings import DatabaseSettings, ShardAddress
from app.scaling import dialect
from app.scaling import replicas as room
from app.scaling.replicas import ReplicaSet

states = st.lists(
    st.tuples(st.booleans(), st.integers(0, 100), st.integers(0, 5)), min_size=0, max_size=5
)  # healthy, position, statements in flight


def replica_set(found: list[tuple[bool, int, int]]) -> ReplicaSet:
    """Replicas in these states; their engines are never connected."""
    nowhere = "postgresql://u@127.0.0.1:1/x"
    address = ShardAddress(primary=nowhere, replicas=(nowhere,) * len(found), first=0, last=1023)
    made = ReplicaSet(0, address, DatabaseSettings())
    for replica, (healthy, position, in_flight) in zip(made.replicas, found, strict=True):
        replica.healthy, replica.position, replica.in_flight = healthy, position, in_flight
    return made


@pytest.mark.sabotage(
    path="app/scaling/replicas.py",
    take_out="if replica.healthy and replica.position >= position and replica not in besides",
    put="if replica.healthy and replica not in besides",
)
@given(states, st.integers(0, 100))
def test_only_a_healthy_replica_that_has_reached_the_position_is_chosen(
    found: list[tuple[bool, int, int]], position: int
) -> None:
    made = replica_set(found)
    chosen = made.choose(position)
    able = [replica for replica in made.replicas if replica.healthy and replica.position >= position]
    assert chosen in able if able else chosen is None


@given(states.filter(len), st.integers(0, 4))
def test_the_node_that_has_just_failed_the_caller_is_not_chosen_again(
    found: list[tuple[bool, int, int]], number: int
) -> None:
    made = replica_set(found)
    failed = made.replicas[number % len(found)]
    assert made.choose(0, besides=[failed]) is not failed


@pytest.mark.sabotage(path="app/scaling/replicas.py", take_out="random.sample(able, 2)", put="able")
def test_the_less_busy_of_two_picked_at_random_answers_so_no_burst_goes_to_the_least_busy_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = replica_set([(True, 1, 0), (True, 1, 1), (True, 1, 2)])
    first, second, third = made.replicas
    for pair, expected in (((second, third), second), ((third, first), first), ((first, second), first)):
        monkeypatch.setattr("app.scaling.replicas.random.sample", lambda _able, _count, pair=pair: list(pair))
        assert made.choose(0) is expected


def test_reads_spread_over_equally_busy_replicas() -> None:
    made = replica_set([(True, 1, 0)] * 3)
    counts = Counter(made.choose(0).name for _ in range(3000))
    assert len(counts) == 3
    assert min(counts.values()) > 700


@pytest.mark.sabotage(
    path="app/scaling/replicas.py",
    take_out='self._mark(node, healthy=False, reason="a read failed")',
    put="return",
)
def test_a_replica_that_failed_a_read_takes_no_more_until_its_watcher_sees_it() -> None:
    made = replica_set([(True, 1, 0), (True, 1, 0)])
    made.failed(made.replicas[0])
    assert {made.choose(0).name for _ in range(50)} == {"replica-2"}
    made.failed(made.primary)
    assert {made.choose(0).name for _ in range(50)} == {"replica-2"}


PRIMARY, REPLICA = "postgresql://u@127.0.0.1:1/nowhere", "postgresql://u@127.0.0.1:2/nowhere"


class Connection:
    """A connection to a replica that has replayed up to 7."""

    def terminate(self) -> None:
        """Close it."""


@pytest.mark.sabotage(
    path="app/scaling/dialect/postgresql.py",
    take_out="    asyncpg.InternalClientError,\n)",
    put=")",
)
@pytest.mark.parametrize(
    "error",
    [ConnectionRefusedError(), TimeoutError(), asyncpg.CannotConnectNowError("starting up"),
     asyncpg.InvalidCatalogNameError("not replayed yet"), asyncpg.InternalClientError("cannot switch to state 12")],
)  # fmt: skip
async def test_a_watcher_outlives_whatever_a_starting_replica_does(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = ShardAddress(primary=PRIMARY, replicas=(REPLICA,), first=0, last=1023)
    made = ReplicaSet(0, address, DatabaseSettings(replica_poll=0.001))
    answers: list[Exception | Connection] = [error, error, Connection()]
    seen_down, joined = asyncio.Event(), asyncio.Event()

    real_connect, real_state = dialect.connect, dialect.state

    async def connect(url: str, *arguments: Any, **more: Any) -> Any:
        if url == PRIMARY:
            raise ConnectionRefusedError
        if url != REPLICA:  # other tests' instances live in this process as well
            return await real_connect(url, *arguments, **more)
        if len(answers) < 3:
            await seen_down.wait()
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def state(connection: Any) -> dialect.State:
        if not isinstance(connection, Connection):
            return await real_state(connection)
        joined.set()
        return dialect.State(is_primary=False, position=7, received=7, history=1)

    monkeypatch.setattr(dialect, "connect", connect)
    monkeypatch.setattr(dialect, "state", state)
    await made.start()
    assert not made.replicas[0].healthy
    seen_down.set()
    _, watcher = made._watchers
    await asyncio.wait({watcher, asyncio.create_task(joined.wait())}, return_when=asyncio.FIRST_COMPLETED)
    assert made.choose(7) is made.replicas[0]
    await made.stop()


@pytest.mark.sabotage(
    path="app/scaling/replicas.py", take_out="        elif now >= replica.out_until:\n", put="        else:\n"
)
def test_a_replica_that_keeps_failing_reads_although_it_answers_is_tried_less_and_less_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = 1000.0
    monkeypatch.setattr(room, "monotonic", lambda: clock)
    made = replica_set([(True, 1, 0), (True, 1, 0)])
    broken = made.replicas[0]
    waits = []
    for _ in range(8):
        made.failed(broken)
        failed_at = clock
        while not broken.healthy:
            clock += 0.1
            made._judge(broken, 0, clock)
        waits.append(clock - failed_at)
    assert all(
        longest / 2 <= wait <= longest + 0.2 for wait, longest in zip(waits, (1, 2, 4, 8, 16, 30, 30, 30), strict=True)
    )
    # Long after its last failure it counts as new.
    clock += 2 * room.LONGEST_OUT
    made.failed(broken)
    assert broken.out_until - clock <= room.FIRST_OUT


@pytest.mark.sabotage(path="app/scaling/replicas.py", take_out="random.uniform(0.5, 1)", put="1")
def test_many_instances_do_not_come_back_to_a_replica_in_step() -> None:
    returns = set()
    for _ in range(20):
        made = replica_set([(True, 1, 0)])
        made.failed(made.replicas[0])
        returns.add(round(made.replicas[0].out_until - room.monotonic(), 2))
    assert len(returns) > 5
