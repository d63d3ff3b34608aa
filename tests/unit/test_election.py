"""Which server is the primary: the one that says so, of several the one with the newest history, whoever was first."""

import pytest

from app.core.settings import DatabaseSettings, ShardAddress
from app.scaling.dialect import State
from app.scaling.node import Node
from app.scaling.replicas import ReplicaSet

NOWHERE = "postgresql://u@127.0.0.1:1/x"


def primary_at(position: int, history: int) -> State:
    return State(is_primary=True, position=position, received=position, history=history)


def replica_at(position: int, history: int) -> State:
    return State(is_primary=False, position=position, received=position, history=history)


@pytest.fixture
def nodes() -> ReplicaSet:
    """A primary at 100 with two replicas that have replayed it, on their first history."""
    address = ShardAddress(primary=NOWHERE, replicas=(NOWHERE, NOWHERE), first=0, last=1023)
    made = ReplicaSet(0, address, DatabaseSettings())
    first, second, third = made.nodes
    made._learn(first, primary_at(100, 1), now=1.0)
    made._learn(second, replica_at(100, 1), now=1.0)
    made._learn(third, replica_at(90, 1), now=1.0)
    assert made.takes_writes
    return made


def able(made: ReplicaSet, position: int = 0) -> set[Node]:
    return {node for _ in range(50) if (node := made.choose(position)) is not None}


@pytest.mark.sabotage(
    path="app/scaling/replicas.py",
    take_out="        self.primary = best\n",
    put="        return\n        self.primary = best\n",
)
def test_a_promoted_replica_is_the_primary_from_the_moment_it_says_so(nodes: ReplicaSet) -> None:
    first, second, third = nodes.nodes
    nodes._lost(first, ConnectionResetError())
    assert not nodes.takes_writes
    assert able(nodes) == {second, third}
    nodes._learn(second, primary_at(101, 2), now=2.0)
    assert (nodes.primary, nodes.takes_writes, nodes.replicas) == (second, True, (first, third))
    assert (nodes.name_of(second), nodes.name_of(first)) == ("primary", "replica-0")


@pytest.mark.sabotage(
    path="app/scaling/replicas.py", take_out="key=lambda n: (n.history, n.answers,", put="key=lambda n: (n.answers,"
)
def test_a_primary_of_before_that_comes_back_is_none_even_while_the_new_one_is_away(nodes: ReplicaSet) -> None:
    first, second, _ = nodes.nodes
    nodes._lost(first, ConnectionResetError())
    nodes._learn(second, primary_at(101, 2), now=2.0)
    nodes._lost(second, ConnectionResetError())
    nodes._learn(first, primary_at(500, 1), now=3.0)
    assert nodes.primary is second
    assert not nodes.takes_writes
    assert first not in able(nodes)


def test_a_primary_of_before_that_comes_back_as_a_replica_takes_reads(nodes: ReplicaSet) -> None:
    first, second, _ = nodes.nodes
    nodes._learn(second, primary_at(101, 2), now=2.0)
    nodes._learn(first, replica_at(101, 2), now=3.0)
    assert first in able(nodes, 101)


@pytest.mark.sabotage(
    path="app/scaling/replicas.py",
    take_out="        return replica.position <= self._shared",
    put="        return True",
)
def test_positions_of_a_log_that_was_given_up_are_not_taken_for_the_primarys(nodes: ReplicaSet) -> None:
    first, second, third = nodes.nodes
    nodes._lost(first, ConnectionResetError())
    nodes._learn(second, primary_at(101, 2), now=2.0)
    # Up to where they parted both logs are the same, and reads go on.
    nodes._learn(third, replica_at(95, 1), now=2.1)
    assert able(nodes) == {third}
    # This one has what the primary never had. That the primary passes the same position means nothing.
    nodes._learn(third, replica_at(120, 1), now=2.2)
    nodes._learn(second, primary_at(110, 2), now=2.3)
    assert able(nodes) == set()
    # Neither does it make anybody late.
    nodes._learn(first, replica_at(110, 2), now=2.4)
    assert (able(nodes, 110), first.lag) == ({first}, 0.0)
    # Once it follows the primary it is one of them.
    nodes._learn(third, replica_at(110, 2), now=2.5)
    assert able(nodes, 110) == {first, third}


def test_before_every_server_was_looked_at_the_first_one_is_the_primary() -> None:
    address = ShardAddress(primary=NOWHERE, replicas=(NOWHERE,), first=0, last=1023)
    made = ReplicaSet(0, address, DatabaseSettings())
    first, second = made.nodes
    # Two names of one server, say the writer's name of a managed service and the server's own.
    made._learn(second, primary_at(100, 1), now=1.0)
    assert made.primary is first
    made._learn(first, primary_at(100, 1), now=1.0)
    assert made.primary is first
    assert made.choose(0) is None


def test_a_server_that_cannot_say_its_history_is_believed(nodes: ReplicaSet) -> None:
    _, second, third = nodes.nodes
    nodes._learn(second, primary_at(101, 2), now=2.0)
    nodes._learn(third, replica_at(105, 0), now=2.1)
    assert able(nodes, 105) == {third}


def test_nobody_reads_from_a_primary_that_says_it_is_a_replica_what_only_a_primary_can_know(nodes: ReplicaSet) -> None:
    first, *_ = nodes.nodes
    nodes._learn(first, replica_at(100, 1), now=2.0)
    assert nodes.primary is first
    assert not nodes.takes_writes
