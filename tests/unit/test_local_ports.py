"""Ports of servers: whoever has chosen one has it, whether or not it listens yet, until the process ends."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from deploy.local.layout import Layout, read_json
from deploy.local.ports import FIRST_FREE_PORT, LAST_FREE_PORT, Claims, choose_ports, port_is_free

# Chooses so many ports of a range, prints them, and keeps them until its input ends.
CHOOSES = """
import sys
from deploy.local import ports
first, last, number = map(int, sys.argv[1:])
ports.FIRST_FREE_PORT, ports.LAST_FREE_PORT = first, last
print(*(ports.free_port() for _ in range(number)), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = Layout(tmp_path, tmp_path / "state")
    made.create(None)
    return made


@pytest.fixture
def claims() -> Iterator[Claims]:
    made = Claims()
    yield made
    made.release()


def chooser(first: int, last: int, number: int) -> "subprocess.Popen[str]":
    """Start a process that chooses so many ports of a range and keeps them until its input ends."""
    command = [sys.executable, "-c", CHOOSES, *map(str, (first, last, number))]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # noqa: S603  # ours


def printed(process: "subprocess.Popen[str]") -> list[int]:
    """Return the ports that it has chosen."""
    assert process.stdout is not None
    return [int(port) for port in process.stdout.readline().split()]


@pytest.mark.sabotage("deploy/local/ports.py", "            claim.bind((HOST, port))", "            pass")
def test_processes_that_choose_at_the_same_time_never_get_the_same_port() -> None:
    # So few ports that, chosen by luck, some would be the same: four clusters at once on twice what they need.
    number, each = 4, 15
    choosers = [chooser(FIRST_FREE_PORT, FIRST_FREE_PORT + 2 * number * each, each) for _ in range(number)]
    try:
        with ThreadPoolExecutor(number) as pool:
            chosen = [port for ports in pool.map(printed, choosers) for port in ports]
    finally:
        for process in choosers:
            process.communicate()
    assert len(chosen) == number * each
    assert len(set(chosen)) == len(chosen)


def test_a_port_is_anybodys_again_when_its_owner_has_ended(claims: Claims) -> None:
    owner = chooser(FIRST_FREE_PORT, LAST_FREE_PORT, 1)
    try:
        (port,) = printed(owner)
        assert port_is_free(port), "nobody listens there"
        assert not claims.take(port)
    finally:
        owner.kill()
        owner.communicate()
    assert claims.take(port)
    assert not claims.take(port), "once is enough"
    claims.release()
    assert claims.take(port)


def test_ports_lie_where_no_outgoing_connection_takes_them(layout: Layout, claims: Claims) -> None:
    ports = choose_ports(layout, ["primary", "replica-1", "redis"], claims, usual=False)
    assert len(set(ports.values())) == 3
    assert all(FIRST_FREE_PORT <= port <= LAST_FREE_PORT for port in ports.values())


def test_a_port_is_kept_while_it_is_free_and_given_up_when_it_is_not(layout: Layout, claims: Claims) -> None:
    def chosen() -> int:
        claims.release()
        return choose_ports(layout, ["redis"], claims, usual=False)["redis"]

    first = chosen()
    assert chosen() == first
    with socket.socket() as other:
        other.bind(("127.0.0.1", first))
        other.listen(1)
        assert not port_is_free(first)
        assert chosen() != first


def test_ports_of_before_that_cannot_be_read_are_chosen_anew(layout: Layout, claims: Claims) -> None:
    layout.ports.write_text('{"redis": 1')
    chosen = choose_ports(layout, ["redis"], claims, usual=False)
    assert read_json(layout.ports) == chosen
