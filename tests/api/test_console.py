"""The console as a client without a browser sees it: who gets what, with which headers, and for how long."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from conftest import PATIENCE, Customer
from expectations import check_problem

from app.api import console
from app.core.ids import new_id
from app.core.settings import ConsoleSettings, Settings
from app.domain.profiles.rules import ADMIN
from app.domain.sessions.rules import Session
from app.main import create_app
from app.scaling.census import Census
from app.scaling.lifecycle import Phase
from app.scaling.pulse import PULSES
from app.wiring import open_resources, pulse_of
from deploy.local.cluster import Cluster

Make = Callable[..., Awaitable[Customer]]
NewProduct = Callable[..., Awaitable[dict[str, Any]]]


@asynccontextmanager
async def watching(client: httpx.AsyncClient, at: str = "") -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
    """Open the stream and yield its censuses."""
    async with client.stream("GET", f"{at}/console/stream") as answer:
        assert answer.status_code == 200, await answer.aread()
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-store"
        yield censuses(answer.aiter_lines())


async def censuses(lines: AsyncIterator[str]) -> AsyncIterator[dict[str, Any]]:
    event = ""
    async for line in lines:
        name, _, value = line.partition(": ")
        if name == "event":
            event = value
        elif name == "data" and event == "census":
            yield json.loads(value)


async def once(taken: AsyncIterator[dict[str, Any]], true: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Return the first census of which something is true."""
    async with asyncio.timeout(PATIENCE):
        async for census in taken:
            if true(census):
                return census
    raise AssertionError("the stream ended before")


async def asked(settings: Settings, path: str, address: str = "127.0.0.1") -> httpx.Response:
    """Ask an instance with these settings, as somebody at an address."""
    app = create_app(settings)
    async with open_resources(settings) as resources:
        app.state.resources = resources
        transport = httpx.ASGITransport(app, client=(address, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.get(path)


@pytest.mark.sabotage("app/api/console/__init__.py", "script-src 'self'", "script-src 'self' https://cdn.example")
async def test_the_page_runs_and_loads_nothing_but_its_own_files(client: httpx.AsyncClient) -> None:
    page = await client.get("/console")
    policy = page.headers["content-security-policy"]
    assert re.fullmatch(
        r"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        r"connect-src 'self'( http://127\.0\.0\.1:\d+)?; "
        r"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        policy,
    )
    assert not re.search(r"<style|style=|\son\w+=|<script(?! type=\"module\" src=)", page.text)
    names = set(re.findall(r'(?:src|href)="/console/([^"]+)"', page.text))
    for name in tuple(names):
        if name.endswith(".js"):
            names |= await imported(client, name)
    assert names == set(console.FILES)
    for name, media_type in console.FILES.items():
        answer = await client.get(f"/console/{name}")
        assert answer.headers["content-type"].startswith(media_type)
        assert not re.search(r"(?:src|href|from|url\()[=\s\"'(]+(?:https?:)?//", answer.text)


async def imported(client: httpx.AsyncClient, name: str) -> set[str]:
    """Return the modules that a module imports, and those that they import."""
    text = (await client.get(f"/console/{name}")).text
    found = set(re.findall(r'from "/console/([^"]+)"', text))
    return found.union(*[await imported(client, each) for each in found]) if found else found


@pytest.mark.parametrize("path", ["/console", "/console/console.js", "/console/console.css"])
async def test_its_files_are_kept_by_browsers_that_ask_each_time(client: httpx.AsyncClient, path: str) -> None:
    answer = await client.get(path)
    assert answer.headers["cache-control"] == "private, no-cache"
    again = await client.get(path, headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == answer.headers["etag"]
    assert (await client.get(path, headers={"If-None-Match": '"another"'})).status_code == 200


@pytest.mark.sabotage(
    "app/api/console/__init__.py", "ResourcesDep, TrustedAdmin,", "ResourcesDep, Caller as TrustedAdmin,"
)
async def test_only_an_administrator_may_watch(client: httpx.AsyncClient, new_customer: Make, admin: Customer) -> None:
    check_problem(await client.get("/console/stream"), 401, "unauthenticated")
    check_problem(await (await new_customer()).client.get("/console/stream"), 403, "forbidden")
    async with watching(admin.client) as taken:
        assert (await anext(taken))["processes"]


@pytest.mark.sabotage("app/api/console/__init__.py", "    check_trusted_address(request.scope)\n", "")
@pytest.mark.parametrize("path", ["/console", "/console/console.js", "/console/stream"])
async def test_at_an_address_that_may_not_administer_there_is_no_console(settings: Settings, path: str) -> None:
    check_problem(await asked(settings, path, "203.0.113.7"), 403, "forbidden")


@pytest.mark.sabotage("app/api/console/__init__.py", "if not resources.settings.console.enabled:", "if False:")
@pytest.mark.parametrize("path", ["/console", "/console/console.js", "/console/stream"])
async def test_a_console_that_is_off_is_not_there(settings: Settings, path: str) -> None:
    off = settings.model_copy(update={"console": ConsoleSettings(enabled=False)})
    check_problem(await asked(off, path), 404, "not_found")


async def test_where_it_is_off_no_process_tells_of_itself(settings: Settings) -> None:
    service = settings.service.model_copy(update={"instance": "silent-one"})
    update = {"service": service, "console": ConsoleSettings(enabled=False)}
    app = create_app(settings.model_copy(update=update))
    async with app.router.lifespan_context(app):
        names = await app.state.resources.redis.client.hkeys(PULSES)
        assert not any(name.startswith(b"silent-one") for name in names)
        assert [task.get_name() for task in asyncio.all_tasks()].count("pulse") == 0


@pytest.mark.sabotage("app/scaling/pulse.py", '            "figures": figures(),', '            "figures": {},')
async def test_the_stream_shows_every_process_with_its_figures(cluster: Cluster, admin: Customer) -> None:
    ours = {process.name for process in cluster.processes if process.kind in {"api", "relay", "worker"}}

    def all_tell(census: dict[str, Any]) -> bool:
        living = {each["name"] for each in census["processes"] if not each["gone"]}
        return ours <= living

    async with watching(admin.client) as taken:
        census = await once(taken, all_tell)
    roles = {each["name"]: each["role"] for each in census["processes"]}
    assert {roles[name] for name in ours} == {"api", "relay", "worker"}
    instance = next(each for each in census["processes"] if each["name"] == "api-1" and not each["gone"])
    assert instance["figures"]["requests"]["2xx"] >= 1
    assert instance["figures"]["durations"]["+Inf"] >= 1
    assert [node["primary"] for node in instance["shards"][0]["nodes"]].count(True) == 1
    relay = next(each for each in census["processes"] if each["role"] == "relay" and not each["gone"])
    assert set(relay["figures"]["oldest"]) == {"0"}
    assert census["redis"]["calls"] >= 0


@pytest.mark.sabotage("app/scaling/census.py", 'named[b"subject_id"].decode()[-6:]', 'named[b"payload"].decode()')
async def test_it_tells_of_an_order_as_it_happens_and_nothing_of_whose_it_is(
    admin: Customer, new_customer: Make, new_product: NewProduct
) -> None:
    customer = await new_customer()
    async with watching(admin.client) as taken:
        order = (await customer.order((await new_product())["id"])).json()

        def ours(census: dict[str, Any]) -> set[str]:
            return {each["event"] for each in census["events"] if each["subject"] == order["id"][-6:]}

        said = []
        seen: set[str] = set()
        while not {"order.placed", "order.confirmed"} <= seen:
            census = await once(taken, lambda _: True)
            said.append(json.dumps(census))
            seen |= ours(census)
    assert census["counts"]["order.placed"] >= 1
    told = "".join(said)
    for private in ("@", customer.profile["id"], order["id"], customer.profile["name"]):
        assert private not in told


@pytest.mark.sabotage("app/api/console/__init__.py", "(looks and not await session_lives(resources, session))", "False")
async def test_the_stream_ends_with_its_session(admin: Customer) -> None:
    async with asyncio.timeout(PATIENCE), watching(admin.client) as taken:
        await anext(taken)
        (await admin.client.delete("/api/v1/sessions/current")).raise_for_status()
        async for _ in taken:
            pass


@pytest.mark.sabotage("app/api/console/__init__.py", "resources.lifecycle.draining.is_set() or ", "")
async def test_an_instance_that_drains_ends_its_streams(settings: Settings) -> None:
    now = datetime.now(UTC)
    session = Session(new_id(), "k" * 64, "enterprise", ADMIN, now, now, now + timedelta(hours=1))
    async with open_resources(settings) as resources:
        census = Census(resources.pipe, pulse_of(resources, "api").view)
        frames = console._frames(resources, session, census)
        async with asyncio.timeout(PATIENCE), aclosing(frames):
            while not (await anext(frames)).startswith(b"event: census"):
                pass
            resources.lifecycle.enter(Phase.DRAINING)
            with pytest.raises(StopAsyncIteration):
                await anext(frames)
        await census.stop()
