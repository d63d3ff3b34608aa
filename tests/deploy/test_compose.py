"""The stack of docker-compose.yml, run for real: it sells, it scales, it is replaced and broken under load.

`make test-compose` runs it; it needs a Docker engine and takes about eight minutes, with `STACKS=default` half of that.
Each stack gets a project name and ports of its own, so that one that is already running here is left alone.
"""

import json
import os
import re
import socket
import subprocess
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self
from uuid import uuid4

import httpx
import pytest

from deploy import smoke

CHECKOUT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    "COMPOSE_TESTS" not in os.environ, reason="make test-compose runs these: they need a Docker engine and minutes"
)
of_its_own = pytest.mark.skipif(
    os.environ.get("COMPOSE_TESTS") == "default", reason="make test-compose runs these, without STACKS=default"
)

# The most that anything here takes on two cores, image builds apart.
PATIENCE_SECONDS = 240.0
# What the relay still has to bring about, for whoever looks at an order that did not come to its end.
WAITING = "SELECT event, tries, count(*), min(due_at), now() FROM outbox WHERE done_at IS NULL GROUP BY event, tries"


class Stack:
    """A stack under test: `docker compose` on a project of its own, with the settings of `profile`."""

    def __init__(self, profile: str = "") -> None:
        project = {"COMPOSE_PROJECT_NAME": f"scaleout-test-{uuid4().hex[:8]}"}
        settings = {"COMPOSE_ENV_FILES": f"deploy/compose/{profile}.env"} if profile else {}
        limits = {f"RATE_LIMIT_{tier}": "1000000/minute" for tier in ("ANONYMOUS", "FREE", "SIGN_IN")}
        self.ports = dict(zip(("PORT", "MAIL_PORT", "PROMETHEUS_PORT"), map(str, free_ports(3)), strict=True))
        self.environment = os.environ | limits | self.ports | settings | project

    def compose(self, *arguments: str) -> str:
        """Run `docker compose` and return what it printed; a failure shows both outputs."""
        return self.command("docker", "compose", *arguments)

    def command(self, *arguments: str) -> str:
        """Run a command in the checkout, for this project."""
        done = subprocess.run(  # noqa: S603 - the commands of this file
            arguments, cwd=CHECKOUT, env=self.environment, capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, f"{' '.join(arguments)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    def up(self) -> None:
        """Start it and wait until all of it is healthy."""
        self.compose("up", "--detach", "--wait", "--wait-timeout", "500")

    def buy(self) -> smoke.Order:
        """Have an order go all the way to its invoice; where that fails, show what became of it."""
        try:
            return smoke.run(self.url, print)
        except smoke.SmokeError:
            print(self.compose("ps", "--all"))  # noqa: T201 - pytest shows it with the failure
            print(self.compose("logs", "--tail", "40", "relay", "worker", "payments"))  # noqa: T201
            print(psql(self, "primary", WAITING))  # noqa: T201
            raise

    def scale(self, instances: int) -> None:
        """Have so many instances, all healthy."""
        self.compose("up", "--detach", "--wait", "--no-deps", "--no-recreate", "--scale", f"api={instances}", "api")

    def containers(self, service: str) -> set[str]:
        """The identities of the running containers of a service."""
        return set(self.compose("ps", "--quiet", service).split())

    @property
    def url(self) -> str:
        """Where NGINX is published. Links to objects lead there too, so the service must know the port."""
        return f"http://127.0.0.1:{self.ports['PORT']}"


class Load:
    """A steady stream of reads and writes through NGINX for the block, and what became of each."""

    def __init__(self, url: str, token: str, product_id: str) -> None:
        self.answers: Counter[str] = Counter()
        # Who answered last: enough of them that every instance has had its turn.
        self.recent: deque[str] = deque(maxlen=60)
        self._url, self._token, self._product_id = url, token, product_id
        self._over = threading.Event()
        self._threads = [threading.Thread(target=work) for work in (self._read, self._read, self._write)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    @property
    def failures(self) -> dict[str, int]:
        """Everything that a customer would have noticed, by kind."""
        return {answer: count for answer, count in self.answers.items() if answer not in {"GET 200", "POST 202"}}

    def _read(self) -> None:
        self._go_on("GET", 0.05, lambda client: client.get("products?limit=5"))

    def _write(self) -> None:
        order = {"items": [{"product_id": self._product_id, "quantity": 1}], "payment_method": "tok_ok"}
        # Four orders are two dozen tasks a second: what the workers keep up with on two cores.
        self._go_on(
            "POST", 0.25, lambda client: client.post("orders", json=order, headers={"Idempotency-Key": uuid4().hex})
        )

    def _go_on(self, method: str, pause: float, call: Callable[[httpx.Client], httpx.Response]) -> None:
        headers = {"Authorization": f"Bearer {self._token}"}
        with httpx.Client(base_url=f"{self._url}/api/v1/", headers=headers, timeout=15) as client:
            while not self._over.wait(pause):
                try:
                    answer = call(client)
                except httpx.TransportError as error:
                    self.answers[f"{method} {type(error).__name__}"] += 1
                    continue
                self.answers[f"{method} {answer.status_code}"] += 1
                self.recent.append(answer.headers.get("X-Instance", "nginx"))


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    with ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [server.getsockname()[1] for server in servers]


def until(holds: Callable[[], bool], what: str) -> None:
    """Wait for a condition, which `what` describes when it does not come."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < deadline, f"waited {PATIENCE_SECONDS:.0f} s in vain: {what}"
        time.sleep(0.2)


@contextmanager
def running(profile: str = "") -> Iterator[Stack]:
    """Start a stack and remove it with its data afterwards."""
    stack = Stack(profile)
    stack.compose("build", "--quiet")
    try:
        stack.up()
        yield stack
    finally:
        stack.compose("--profile", "*", "down", "--volumes", "--timeout", "10")


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """The stack as it is without settings."""
    with running() as started:
        yield started


@pytest.fixture(scope="module")
def order(stack: Stack) -> smoke.Order:
    """An order that went all the way to its invoice, and its customer."""
    return stack.buy()


@pytest.fixture
def load(stack: Stack, order: smoke.Order) -> Iterator[Load]:
    """Customers, for as long as the test runs."""
    answer = httpx.get(f"{stack.url}/api/v1/products", headers={"Authorization": f"Bearer {order.token}"}, timeout=15)
    # A product with much left: an order that is rejected later is no failure, but this keeps the logs plain.
    product = max(answer.json()["items"], key=lambda item: item["available"])
    with Load(stack.url, order.token, product["id"]) as running:
        until(lambda: running.answers["POST 202"] > 0 and running.answers["GET 200"] > 0, "the first answers")
        yield running
    if running.failures:
        # pytest shows this with the failure: which instances NGINX had tried, and what became of it.
        said = stack.compose("logs", "--no-log-prefix", "nginx").splitlines()
        print(*[line for line in said if "[error]" in line or re.search(r'"status":"5\d\d"', line)][-20:], sep="\n")  # noqa: T201 - see above


def test_an_order_goes_all_the_way_and_its_mail_arrives(stack: Stack, order: smoke.Order) -> None:
    mails = f"http://127.0.0.1:{stack.ports['MAIL_PORT']}/api/v1/messages"

    def arrived() -> bool:
        found = httpx.get(mails, timeout=15).json()["messages"]
        return any(order.id in mail["Subject"] and mail["Attachments"] == 1 for mail in found)

    until(arrived, "the confirmation mail")


def test_only_nginx_and_the_mail_page_are_published_and_only_here(stack: Stack) -> None:
    listed = [json.loads(line) for line in stack.compose("ps", "--format", "json").splitlines()]
    published = {
        (entry["Service"], port["URL"]) for entry in listed for port in entry["Publishers"] if port["PublishedPort"]
    }
    assert published == {("nginx", "127.0.0.1"), ("mail", "127.0.0.1")}


def test_no_process_of_ours_is_root_or_can_write_to_its_image(stack: Stack) -> None:
    for service in ("api", "relay", "worker", "scheduler"):
        said = stack.compose("exec", "-T", service, "sh", "-c", "id -u; touch /app/here 2>/dev/null || echo refused")
        assert said.split() == ["10001", "refused"]


def test_two_more_instances_get_traffic_without_a_restart_and_leave_without_a_failure(stack: Stack, load: Load) -> None:
    nginx = stack.containers("nginx")
    stack.scale(5)
    until(lambda: len(set(load.recent)) == 5, "five instances that answer")
    stack.scale(3)
    until(lambda: len(set(load.recent)) == 3, "three instances that answer")
    assert load.failures == {}
    assert stack.containers("nginx") == nginx


def test_replacing_every_instance_fails_no_request(stack: Stack, load: Load) -> None:
    before = stack.containers("api")
    stack.command("deploy/compose/rollout.sh", "api")
    after = stack.containers("api")
    assert len(after) == len(before)
    assert not after & before
    assert load.failures == {}


def test_reads_and_writes_go_on_when_a_replica_is_killed_and_it_comes_back(stack: Stack, load: Load) -> None:
    (replica,) = stack.containers("replica-1")
    stack.command("docker", "kill", "--signal", "KILL", replica)
    seen = load.answers.copy()
    until(
        lambda: load.answers["GET 200"] > seen["GET 200"] + 60 and load.answers["POST 202"] > seen["POST 202"] + 10,
        "reads and orders go on",
    )
    assert load.failures == {}
    stack.up()

    def back() -> bool:
        query = "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'"
        return psql(stack, "primary", query) == "2"

    until(back, "both replicas stream again")


def test_what_is_cached_is_kept_apart_from_what_may_not_be_dropped(stack: Stack, order: smoke.Order) -> None:
    headers = {"Authorization": f"Bearer {order.token}"}
    listed = httpx.get(f"{stack.url}/api/v1/products?limit=1", headers=headers, timeout=15).raise_for_status().json()
    product = f"{stack.url}/api/v1/products/{listed['items'][0]['id']}"
    httpx.get(product, headers=headers, timeout=15).raise_for_status()

    def keys(service: str) -> set[str]:
        ask = 'REDISCLI_AUTH=$(cut -d " " -f 2 /run/secrets/password.conf) redis-cli --scan'
        said = stack.compose("exec", "-T", service, "sh", "-c", ask).split()
        return {key.partition(":")[0] for key in said}

    assert "session" in keys("redis")
    assert "session" not in keys("cache")
    assert {"product", "list"} <= keys("cache")
    assert not {"product", "list"} & keys("redis")


def test_prometheus_finds_every_process(stack: Stack) -> None:
    stack.compose("--profile", "observability", "up", "--detach", "--no-deps", "prometheus")

    def all_are_up() -> bool:
        try:
            asked = httpx.get(f"http://127.0.0.1:{stack.ports['PROMETHEUS_PORT']}/api/v1/targets", timeout=5)
        except httpx.TransportError:
            return False
        if asked.status_code != 200:
            return False
        targets = asked.json()["data"]["activeTargets"]
        return Counter((each["labels"]["job"], each["health"]) for each in targets) == expected

    # Three instances; a relay and two workers.
    expected = Counter({("api", "up"): 3, ("background", "up"): 3})
    until(all_are_up, "six targets that are up")


def test_data_and_sessions_survive_down_and_up(stack: Stack, order: smoke.Order) -> None:
    stack.compose("down", "--timeout", "30")
    stack.up()
    headers = {"Authorization": f"Bearer {order.token}"}
    answer = httpx.get(f"{stack.url}/api/v1/orders/{order.id}", headers=headers, timeout=15)
    assert answer.status_code == 200
    assert answer.json()["status"] == "confirmed"
    assert stack.buy().id != order.id


@of_its_own
def test_two_shards_each_hold_their_half_of_the_profiles() -> None:
    with running("two-shards") as stack:
        held = Counter[str]()
        while not held.keys() >= {"primary", "shard-1"}:
            stack.buy()
            for shard in ("primary", "shard-1"):
                held[shard] = int(psql(stack, shard, "SELECT count(*) FROM orders"))
            held += Counter()


@of_its_own
def test_all_connections_come_through_the_pooler() -> None:
    with running("pgbouncer") as stack:
        stack.buy()
        for server in ("primary", "replica-1", "replica-2"):
            query = "SELECT count(DISTINCT client_addr) FROM pg_stat_activity WHERE usename = 'scaleout'"
            assert psql(stack, server, query) == "1"


@of_its_own
def test_mariadb_serves_it_alone() -> None:
    with running("mysql") as stack:
        stack.buy()
        assert not stack.containers("primary")


def psql(stack: Stack, server: str, query: str) -> str:
    """Ask a PostgreSQL server as its superuser, in the service's database."""
    ask = ("psql", "-h", "/var/run/postgresql", "-d", "scaleout", "-XAtc", query)
    return stack.compose("exec", "-T", server, *ask).strip()
