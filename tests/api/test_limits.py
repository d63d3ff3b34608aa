"""Rate limits at the edge: an application in this process, with low limits, against the cluster's Redis."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from ipaddress import ip_network
from itertools import count
from time import monotonic
from uuid import UUID, uuid4

import httpx
import psutil
import pytest
from conftest import PASSWORD, Customer, settings_from, until
from expectations import check_problem
from slowapi import Limiter
from slowapi.errors import RateLimitExceeded

from app.api.exchange import Exchange
from app.api.limits import judge
from app.core.context import Work
from app.core.settings import Settings
from app.core.telemetry import DATABASE_STATEMENTS
from app.domain.sessions.admission import Admissions
from app.domain.sessions.rules import new_token
from app.main import create_app
from app.scaling.ratelimit import Verdict
from app.scaling.redis_link import RedisDown
from app.wiring import Resources
from deploy.local.cluster import Cluster

Make = Callable[..., Awaitable[Customer]]
Connect = Callable[..., httpx.AsyncClient]
_numbers = count(1)
EXEMPT = ("/health", "/metrics", "/docs", "/openapi.json")
# Enough to build an application whose routes can be listed.
UNCONNECTED = {
    "SECRET_KEY": "0123456789abcdef" * 4,
    "DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none",
    "REDIS_URL": "redis://127.0.0.1:1/0",
    "STORAGE_URL": "file:///tmp/none",
    "PAYMENT_URL": "http://127.0.0.1:1",
    "SMTP_URL": "smtp://127.0.0.1:1",
}


def fresh_address() -> str:
    """An address that no other test has used: documentation addresses, so that windows of tests do not meet."""
    number = next(_numbers)
    return f"2001:db8:{uuid4().hex[:4]}:{uuid4().hex[:4]}::{number:x}"


@pytest.fixture
async def connect(settings: Settings, resources: Resources) -> AsyncIterator[Connect]:
    """Connect from an address of one's choice to an instance with low limits that trusts the proxy 10.0.0.1."""
    rates = settings.rates.model_copy(update={"anonymous": "3/minute", "free": "4/hour", "sign_in": "2/minute"})
    service = settings.service.model_copy(update={"trusted_proxies": (ip_network("10.0.0.0/8"),)})
    low = settings.model_copy(update={"rates": rates, "service": service})
    app = create_app(low)
    admissions = Admissions(resources.pipe, resources.pipe, resources.near, resources.limiter, low)
    app.state.resources = replace(resources, settings=low, admissions=admissions)
    opened: list[httpx.AsyncClient] = []

    def make(address: str) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(app, client=(address, 1234))
        opened.append(httpx.AsyncClient(transport=transport, base_url="http://testserver"))
        return opened[-1]

    yield make
    for client in opened:
        await client.aclose()


async def test_strangers_are_limited_by_address(connect: Connect) -> None:
    one, other = connect(fresh_address()), connect(fresh_address())
    left = []
    for _ in range(3):
        answer = await one.get("/api/v1/products?limit=1")
        assert answer.status_code == 200
        assert answer.headers["ratelimit-policy"] == '"anonymous";q=3;w=60'
        left.append(answer.headers["ratelimit"].split(";")[1])
    assert left == ["r=2", "r=1", "r=0"]
    refused = await one.get("/api/v1/products?limit=1")
    check_problem(refused, 429, "rate_limited")
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert refused.headers["ratelimit"] == f'"anonymous";r=0;t={refused.headers["retry-after"]}'
    assert refused.headers["x-content-type-options"] == "nosniff"
    assert (await other.get("/api/v1/products?limit=1")).status_code == 200


# One of every path and method there is, filled in so that its route is found; what stands nowhere is a route too.
EVERY_ROUTE = sorted(
    {
        (method.upper(), re.sub(r"{[^}]+}", "01900000-0000-8000-8000-000000000000", path))
        for path, methods in create_app(settings_from(UNCONNECTED)).openapi()["paths"].items()
        for method in methods
        if not path.startswith(EXEMPT)
    }
    | {("GET", "/"), ("GET", "/api/v1/nothing"), ("TRACE", "/api/v1/products")}
)


@pytest.mark.sabotage(
    path="app/api/middleware.py",
    take_out='if scope["type"] == "http" and not scope["path"].startswith(_EXEMPT):',
    put='if scope["path"].startswith(("/api/v1/products", "/api/v1/profiles", "/api/v1/sessions")):',
)
@pytest.mark.parametrize(("method", "path"), EVERY_ROUTE)
async def test_the_limit_bites_on_every_route(connect: Connect, method: str, path: str) -> None:
    client = connect(fresh_address())
    for left in (2, 1, 0):
        answer = await client.request(method, path)
        assert answer.status_code != 429
        assert answer.headers["ratelimit"].startswith(f'"anonymous";r={left};t=')
    refused = await client.request(method, path)
    check_problem(refused, 429, "rate_limited")
    assert refused.headers["ratelimit"].startswith('"anonymous";r=0;t=')


async def test_the_limit_is_that_of_slowapi_s_users(connect: Connect) -> None:
    app = connect(fresh_address())._transport.app  # type: ignore[attr-defined]
    assert isinstance(app.state.limiter, Limiter)
    with pytest.raises(RateLimitExceeded) as refused:
        judge(
            Exchange(Work(request_id="x"), "x"),
            Verdict(app.state.limiter.anonymous, allowed=False, remaining=0, reset=9),
        )
    assert (refused.value.status_code, str(refused.value.limit.limit)) == (429, "3 per 60 second")


@pytest.mark.sabotage(
    path="app/scaling/line.py",
    take_out="            self._watch = self._loop.call_at(now + self._timeout, self._look)",
    put="            pass",
)
async def test_the_loop_does_not_block_while_redis_stalls(
    connect: Connect, resources: Resources, cluster: Cluster
) -> None:
    client, server = connect(fresh_address()), psutil.Process(cluster.process("redis").pid)

    async def measured(requests: int) -> tuple[list[float], list[float]]:
        """Return how long requests took, and by how much the loop was late meanwhile."""
        times, lags = list[float](), list[float]()

        async def beat() -> None:
            while True:
                began = monotonic()
                await asyncio.sleep(0.01)
                lags.append(monotonic() - began - 0.01)

        beating = asyncio.create_task(beat())
        try:
            for _ in range(requests):
                began = monotonic()
                answer = await client.get("/api/v1/products/search?q=lamp")
                assert answer.status_code in {200, 429}
                times.append(monotonic() - began)
        finally:
            beating.cancel()
        return sorted(times), sorted(lags)

    usual, usual_lags = await measured(50)
    server.suspend()
    try:
        times, lags = await measured(50)
    finally:
        server.resume()
    # The first waits for its timeout; from then on Redis is not asked. On a slow machine everything is slow.
    waiting = resources.settings.redis.timeout
    assert times[25] < waiting / 2 + 2 * usual[25]
    assert lags[len(lags) * 9 // 10] < waiting / 2 + 2 * usual_lags[-1]

    async def back() -> bool:
        try:
            return bool(await resources.pipe.ask("test", "PING"))
        except RedisDown:
            return False

    await until(back)


async def test_probes_and_documentation_are_never_limited(connect: Connect) -> None:
    client = connect(fresh_address())
    for _ in range(5):
        answer = await client.get("/openapi.json")
        assert answer.status_code == 200
        assert "ratelimit" not in answer.headers


async def test_customers_are_limited_by_profile_wherever_they_are(connect: Connect, new_customer: Make) -> None:
    customer, other = await new_customer(), await new_customer()
    headers = {"Authorization": f"Bearer {customer.token}"}
    for _ in range(4):
        answer = await connect(fresh_address()).get("/api/v1/profiles/me", headers=headers)
        # The cluster's own instances count the same customer's requests, but against another quota.
        if answer.status_code == 429:
            break
        assert answer.headers["ratelimit-policy"] == '"free";q=4;w=3600'
    refused = await connect(fresh_address()).get("/api/v1/profiles/me", headers=headers)
    check_problem(refused, 429, "rate_limited")
    fine = await connect(fresh_address()).get("/api/v1/profiles/me", headers={"Authorization": f"Bearer {other.token}"})
    assert fine.status_code == 200


async def test_guessing_tokens_is_limited_like_everything_else(connect: Connect) -> None:
    client = connect(fresh_address())
    for _ in range(3):
        answer = await client.get("/api/v1/orders", headers={"Authorization": "Bearer sct_" + "A" * 64})
        check_problem(answer, 401, "invalid_token")
    answer = await client.get("/api/v1/orders", headers={"Authorization": "Bearer sct_" + "B" * 64})
    check_problem(answer, 429, "rate_limited")


@pytest.mark.sabotage(
    path="app/api/middleware.py",
    take_out="        await self._count(scope, headers)\n        # It",
    put="        # It",
)
@pytest.mark.parametrize("token", ["", "abc", "é", "A" * 2000])
async def test_a_foreign_consistency_token_is_counted_and_then_refused_by_name(connect: Connect, token: str) -> None:
    client = connect(fresh_address())
    for _ in range(3):
        answer = await client.get("/api/v1/products?limit=1", headers={"Consistency-Token": token.encode()})
        check_problem(answer, 400, "invalid_consistency_token", "header/Consistency-Token")
    answer = await client.get("/api/v1/products?limit=1", headers={"Consistency-Token": token.encode()})
    check_problem(answer, 429, "rate_limited")


def _statements() -> float:
    return sum(
        sample.value
        for metric in DATABASE_STATEMENTS.collect()
        for sample in metric.samples
        if sample.name.endswith("_total")
    )


@pytest.mark.sabotage(
    path="app/api/middleware.py",
    take_out="            await limits.count(exchange, resources.limiter, limits.anonymous, subject)\n"
    "        session = await resources.sessions.find(token)\n",
    put="            pass\n"
    "        session = await resources.sessions.find(token)\n"
    "        if session is None and not was_real:\n"
    "            await limits.count(exchange, resources.limiter, limits.anonymous, subject)\n",
)
async def test_tokens_that_somebody_makes_up_cost_no_reads_past_the_limit_of_their_address(
    connect: Connect, new_customer: Make
) -> None:
    customer = await new_customer()
    client, before = connect(fresh_address()), _statements()
    guesses = [f"Bearer {new_token(UUID(customer.profile['id']))[0]}" for _ in range(40)]
    answers = await asyncio.gather(
        *(client.get("/api/v1/orders", headers={"Authorization": guess}) for guess in guesses)
    )
    assert sorted(answer.status_code for answer in answers) == [401] * 3 + [429] * 37
    # A replica may be behind, so what it does not know is asked of the primary, too.
    assert _statements() - before <= 2 * 3


@pytest.mark.sabotage(
    path="app/api/middleware.py",
    take_out="                await resources.limiter.give_back(limits.anonymous, subject)\n",
    put="",
)
async def test_a_customer_whom_redis_has_forgotten_does_not_pay_as_a_stranger(
    connect: Connect, resources: Resources, new_customer: Make
) -> None:
    client = connect(fresh_address())
    for _ in range(5):
        customer = await new_customer()
        await resources.redis.client.delete(*await resources.redis.client.keys(f"session:*{customer.profile['id']}*"))
        answer = await client.get("/api/v1/profiles/me", headers={"Authorization": f"Bearer {customer.token}"})
        assert (answer.status_code, answer.headers["ratelimit-policy"]) == (200, '"free";q=4;w=3600')


@pytest.mark.sabotage(
    path="app/api/middleware.py",
    take_out="was_real = resources.admissions.vouches_for(token)",
    put="was_real = False",
)
async def test_everybody_behind_one_address_goes_on_when_redis_is_lost(
    connect: Connect, resources: Resources, new_customer: Make
) -> None:
    client = connect(fresh_address())
    customers = [await new_customer() for _ in range(8)]

    async def read(customer: Customer) -> int:
        answer = await client.get("/api/v1/profiles/me", headers={"Authorization": f"Bearer {customer.token}"})
        return answer.status_code

    assert [await read(customer) for customer in customers] == [200] * 8
    for customer in customers:
        await resources.redis.client.delete(*await resources.redis.client.keys(f"session:*{customer.profile['id']}*"))
    # As many at once as have no place in the address's limit, so that paying back would come too late.
    for _ in range(3):
        await client.get("/api/v1/products?limit=1")
    assert await asyncio.gather(*map(read, customers)) == [200] * 8


@pytest.mark.sabotage(
    path="app/api/middleware.py",
    take_out="            resources.admissions.doubt(token)\n"
    "            await limits.count(exchange, resources.limiter, limits.anonymous, subject)\n",
    put="            pass\n",
)
async def test_a_session_that_has_ended_is_no_way_around_the_limit(connect: Connect, new_customer: Make) -> None:
    client, customer = connect(fresh_address()), await new_customer()
    headers = {"Authorization": f"Bearer {customer.token}"}
    assert (await client.get("/api/v1/profiles/me", headers=headers)).status_code == 200
    assert (await customer.client.delete("/api/v1/sessions/current")).status_code == 204
    statuses = [(await client.get("/api/v1/profiles/me", headers=headers)).status_code for _ in range(5)]
    assert statuses == [401] * 3 + [429] * 2


async def test_sign_in_is_limited_by_address(connect: Connect) -> None:
    client = connect(fresh_address())
    for _ in range(2):
        body = {"email": f"{uuid4().hex}@example.com", "password": "a guess of somebody"}
        check_problem(await client.post("/api/v1/sessions", json=body), 401, "invalid_credentials")
    refused = await client.post("/api/v1/sessions", json=body | {"email": f"{uuid4().hex}@example.com"})
    check_problem(refused, 429, "rate_limited")
    assert refused.headers["ratelimit-policy"] == '"sign-in";q=2;w=60'


@pytest.mark.sabotage(
    path="app/api/sessions.py",
    take_out="for subject in (limit_subject(exchange.address), account):",
    put="for subject in (limit_subject(exchange.address),):",
)
async def test_sign_in_is_limited_by_account_from_wherever_it_is_tried(connect: Connect) -> None:
    email = f"{uuid4().hex}@example.com"
    for guess in ("first guess of it", "second guess of it"):
        answer = await connect(fresh_address()).post("/api/v1/sessions", json={"email": email, "password": guess})
        check_problem(answer, 401, "invalid_credentials")
    spelled = {"email": email.upper(), "password": "third guess of it"}
    check_problem(await connect(fresh_address()).post("/api/v1/sessions", json=spelled), 429, "rate_limited")


async def test_a_forged_forwarded_for_gives_no_new_window(connect: Connect) -> None:
    behind_proxy = connect("10.0.0.1")
    address = fresh_address()
    for number in range(3):
        forwarded = {"X-Forwarded-For": f"198.51.100.{number}, {address}"}
        assert (await behind_proxy.get("/api/v1/products?limit=1", headers=forwarded)).status_code == 200
    for forged in ("203.0.113.77", "10.0.0.9", "unknown", "::ffff:1.2.3.4"):
        answer = await behind_proxy.get(
            "/api/v1/products?limit=1", headers={"X-Forwarded-For": f"{forged}, {address}", "X-Real-IP": forged}
        )
        check_problem(answer, 429, "rate_limited")
    straight = connect(address)
    answer = await straight.get("/api/v1/products?limit=1", headers={"X-Forwarded-For": "203.0.113.78"})
    check_problem(answer, 429, "rate_limited")


@pytest.mark.sabotage(
    "deploy/nginx/nginx.conf.template",
    "proxy_set_header X-Forwarded-For $remote_addr;",
    "proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;",
)
async def test_through_nginx_the_clients_own_forwarded_for_is_discarded(client: httpx.AsyncClient) -> None:
    left = []
    for number in range(3):
        answer = await client.get("/api/v1/products?limit=1", headers={"X-Forwarded-For": f"203.0.113.{number}"})
        left.append(int(answer.headers["ratelimit"].split(";")[1].removeprefix("r=")))
    assert left[0] > left[1] > left[2]


async def test_a_limit_does_not_lose_what_the_request_was(connect: Connect, new_customer: Make) -> None:
    customer = await new_customer()
    client = connect(fresh_address())
    body = {"email": customer.email, "password": PASSWORD}
    answer = await client.post("/api/v1/sessions", json=body)
    assert answer.status_code == 201
    assert answer.headers["ratelimit-policy"] == '"sign-in";q=2;w=60'  # of the two limits the one nearer to refusing
