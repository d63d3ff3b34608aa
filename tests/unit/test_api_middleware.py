"""The edge without any server: what every answer carries, whoever made it, and what stops a request."""

import asyncio
from collections.abc import AsyncIterator
from ipaddress import ip_network
from types import SimpleNamespace

import httpx
import pytest
from conftest import settings_from
from expectations import check_problem
from fastapi import FastAPI, Request
from prometheus_client import REGISTRY
from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.responses import StreamingResponse

from app.api import middleware, problems
from app.api.exchange import client_address, limit_subject
from app.core import context, errors
from app.core.signing import Signer
from app.scaling.gate import Gate

ENVIRONMENT = {
    "SECRET_KEY": "0123456789abcdef" * 4,
    "DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none",
    "REDIS_URL": "redis://127.0.0.1:1/0",
    "STORAGE_URL": "file:///tmp/none",
    "PAYMENT_URL": "http://127.0.0.1:1",
    "SMTP_URL": "smtp://127.0.0.1:1",
    "INSTANCE": "test-1",
    "REQUEST_DEADLINE": "0.2",
    "BODY_LIMIT": "1000",
}
# Below /health nobody is looked up and nothing is counted, so these tests need no Redis.
RAISED = {
    "invalid": (errors.Invalid.field("/name", "Must be short."), 422, "invalid"),
    "unauthenticated": (errors.Unauthenticated("Sign in."), 401, "unauthenticated"),
    "forbidden": (errors.Forbidden("Not you."), 403, "forbidden"),
    "not_found": (errors.NotFound("No such thing."), 404, "not_found"),
    "conflict": (errors.Conflict("Taken.", code="email_taken"), 409, "email_taken"),
    "precondition_failed": (errors.PreconditionFailed("Changed."), 412, "version_mismatch"),
    "precondition_required": (errors.PreconditionRequired("Which?"), 428, "precondition_required"),
    "too_large": (errors.TooLarge("Too much."), 413, "payload_too_large"),
    "rate_limited": (errors.RateLimited("Wait.", retry_after=7), 429, "rate_limited"),
    "timed_out": (errors.TimedOut("Late."), 504, "deadline_exceeded"),
    "unavailable": (errors.Unavailable("Down.", retry_after=3), 503, "unavailable"),
    "cursor": (errors.Invalid.field("query/cursor", "Not ours.", code="invalid_cursor"), 400, "invalid_cursor"),
}


class Thing(BaseModel):
    """A body with one number."""

    number: int


@pytest.fixture
def app() -> FastAPI:
    """An application with the real middleware and handlers, and routes that fail in every way."""
    settings = settings_from(ENVIRONMENT)
    made = FastAPI(middleware=middleware.layers(settings, Gate(48, 96)), redirect_slashes=False, openapi_url=None)
    problems.install(made)
    made.state.resources = SimpleNamespace(tokens=Signer(settings.service.secret, "consistency token"))

    @made.get("/health/error/{name}")
    async def error(name: str) -> None:
        raise RAISED[name][0]

    @made.get("/health/bug")
    async def bug() -> None:
        raise ZeroDivisionError("SELECT secret FROM passwords")

    @made.get("/health/slow")
    async def slow() -> None:
        await asyncio.wait_for(asyncio.Event().wait(), timeout=3)  # bounded, for a deadline that does not work

    @made.post("/health/thing")
    async def thing(body: Thing) -> int:
        return body.number

    @made.post("/health/echo")
    async def echo(request: Request) -> int:
        return len(await request.body())

    @made.get("/health/positions")
    async def positions() -> dict[str, int]:
        return {str(shard): position for shard, position in context.current().positions.items()}

    @made.get("/health/half")
    async def half() -> StreamingResponse:
        async def parts() -> AsyncIterator[bytes]:
            yield b"half"
            raise ZeroDivisionError

        return StreamingResponse(parts())

    return made


@pytest.fixture
async def edge(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the application, without a server in between."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://testserver") as opened:
        yield opened


def check_headers(answer: httpx.Response) -> None:
    assert answer.headers["x-instance"] == "test-1"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["vary"] == "Authorization, Cookie"
    assert "strict-transport-security" not in answer.headers  # the service is reached over http


@pytest.mark.parametrize("name", RAISED)
async def test_every_kind_of_error_is_a_problem_with_all_headers(edge: httpx.AsyncClient, name: str) -> None:
    raised, status, code = RAISED[name]
    answer = await edge.get(f"/health/error/{name}")
    body = check_problem(answer, status, code)
    check_headers(answer)
    assert body["detail"] == raised.detail
    assert ("errors" in body) == bool(raised.fields)
    assert ("www-authenticate" in answer.headers) == (status == 401)


async def test_retry_after_says_how_long(edge: httpx.AsyncClient) -> None:
    assert (await edge.get("/health/error/rate_limited")).headers["retry-after"] == "7"
    assert (await edge.get("/health/error/unavailable")).headers["retry-after"] == "3"


@pytest.mark.sabotage(
    path="app/api/middleware.py", take_out="await problems.unexpected()(scope, receive, outgoing)", put="raise"
)
async def test_a_bug_tells_the_caller_nothing_but_the_request_id(edge: httpx.AsyncClient) -> None:
    answer = await edge.get("/health/bug")
    check_problem(answer, 500, "internal_error")
    check_headers(answer)
    assert "SELECT" not in answer.text
    assert "ZeroDivision" not in answer.text


async def test_half_an_answer_breaks_off_instead_of_looking_whole(edge: httpx.AsyncClient) -> None:
    with pytest.raises(ZeroDivisionError):
        await edge.get("/health/half")


async def test_unknown_paths_and_methods_are_problems(edge: httpx.AsyncClient) -> None:
    check_problem(await edge.get("/health/nothing/here"), 404, "not_found")
    refused = await edge.put("/health/thing")
    check_problem(refused, 405, "method_not_allowed")
    assert refused.headers["allow"] == "POST"
    head = await edge.put("/health/bug")
    assert head.headers["allow"] == "GET, HEAD"


async def test_trailing_slashes_lead_nowhere(edge: httpx.AsyncClient) -> None:
    check_problem(await edge.get("/health/bug/"), 404, "not_found")


@pytest.mark.sabotage(
    path="app/api/middleware.py",
    take_out="self._deadlines.until(exchange.work.deadline)",
    put="self._deadlines.until(exchange.work.deadline + 3600)",
)
async def test_a_request_past_its_deadline_ends(edge: httpx.AsyncClient) -> None:
    check_problem(await edge.get("/health/slow"), 504, "deadline_exceeded")


async def test_a_body_that_says_it_is_too_long_is_refused_unread(edge: httpx.AsyncClient) -> None:
    answer = await edge.post("/health/echo", content=b"x" * 1001)
    check_problem(answer, 413, "payload_too_large")
    check_headers(answer)
    assert (await edge.post("/health/echo", content=b"x" * 1000)).json() == 1000


@pytest.mark.parametrize("length", ["1001", "9" * 19, "9" * 5000, "0" * 5000, "-1", "1e3", "٣"])
async def test_a_length_that_is_none_or_too_much_is_refused_unread(edge: httpx.AsyncClient, length: str) -> None:
    answer = await edge.post("/health/echo", headers={"Content-Length": length.encode()}, content=b"")
    check_problem(answer, 413, "payload_too_large")


@pytest.mark.sabotage(path="app/api/middleware.py", take_out="if seen > limit:", put="if False:")
async def test_a_streamed_body_is_refused_once_it_is_too_long(edge: httpx.AsyncClient) -> None:
    sent = 0

    async def parts() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(1000):
            sent += 100
            yield b"x" * 100

    check_problem(await edge.post("/health/echo", content=parts()), 413, "payload_too_large")
    assert sent <= 1200


async def test_a_sane_request_id_is_kept_and_an_insane_one_replaced(edge: httpx.AsyncClient) -> None:
    kept = await edge.get("/health/bug", headers={"X-Request-ID": "my-request.1"})
    assert kept.headers["x-request-id"] == kept.json()["request_id"] == "my-request.1"
    for insane in ("short", "x" * 65, 'a"b{}forged', "spaces in it"):
        replaced = (await edge.get("/health/bug", headers={"X-Request-ID": insane})).headers["x-request-id"]
        assert replaced != insane
        assert len(replaced) == 32


async def test_broken_fields_are_named_and_never_echoed(edge: httpx.AsyncClient) -> None:
    answer = await edge.post("/health/thing", json={"number": "hunter2"})
    body = check_problem(answer, 422, "invalid")
    assert [error["pointer"] for error in body["errors"]] == ["/number"]
    assert "hunter2" not in answer.text


@pytest.mark.parametrize("token", ["", "abc", "é", "A" * 2000])
async def test_probes_answer_whatever_a_consistency_token_says(edge: httpx.AsyncClient, token: str) -> None:
    answer = await edge.get("/health/positions", headers={"Consistency-Token": token.encode()})
    assert (answer.status_code, answer.json()) == (200, {})


async def test_head_answers_as_get_without_the_body(edge: httpx.AsyncClient) -> None:
    get = await edge.get("/health/positions")
    head = await edge.head("/health/positions")
    assert head.status_code == 200
    assert head.content == b""
    assert head.headers["content-length"] == get.headers["content-length"]


@pytest.mark.sabotage(path="app/api/metrics.py", take_out="meters_of(template_of(scope)", put='meters_of(scope["path"]')
async def test_metrics_are_counted_by_route_template_and_not_by_path(edge: httpx.AsyncClient) -> None:
    def count(handler: str, status: str, method: str = "GET") -> float:
        labels = {"handler": handler, "status": status, "method": method}
        return REGISTRY.get_sample_value("http_requests_total", labels) or 0.0

    before = (count("/health/error/{name}", "4xx"), count("none", "4xx"), count("none", "4xx", "other"))
    await edge.get("/health/error/conflict")
    await edge.get("/health/error/not_found")
    await edge.get("/health/no/such/path")
    await edge.request("BREW", "/health/no/such/path")
    after = (count("/health/error/{name}", "4xx"), count("none", "4xx"), count("none", "4xx", "other"))
    assert [now - then for now, then in zip(after, before, strict=True)] == [2, 1, 1]
    assert REGISTRY.get_sample_value(
        "http_request_duration_seconds_count", {"handler": "/health/error/{name}", "method": "GET"}
    )


async def test_a_service_on_https_tells_browsers_to_stay_there() -> None:
    settings = settings_from(ENVIRONMENT | {"PUBLIC_URL": "https://shop.example"})
    made = FastAPI(middleware=middleware.layers(settings, Gate(48, 96)))
    problems.install(made)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(made), base_url="https://shop.example") as opened:
        answer = await opened.get("/health/nothing")
    assert answer.headers["strict-transport-security"].startswith("max-age=63072000")


@pytest.mark.sabotage(path="app/api/exchange.py", take_out="for hop in reversed(hops):", put="for hop in hops:")
@pytest.mark.parametrize(
    ("peer", "forwarded", "expected"),
    [
        ("203.0.113.9", [], "203.0.113.9"),
        ("203.0.113.9", ["198.51.100.1"], "203.0.113.9"),
        ("10.0.0.1", ["198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", ["6.6.6.6, 198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", ["6.6.6.6", "198.51.100.1, 10.0.0.2"], "198.51.100.1"),
        ("10.0.0.1", ["6.6.6.6, forged"], "10.0.0.1"),
        ("10.0.0.1", ["10.0.0.3"], "10.0.0.3"),
        ("10.0.0.1", [], "10.0.0.1"),
        ("::ffff:10.0.0.1", ["198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", ["2001:DB8::1"], "2001:db8::1"),
    ],
)
def test_what_a_client_writes_into_forwarded_for_changes_nothing(
    peer: str, forwarded: list[str], expected: str
) -> None:
    headers = Headers(raw=[(b"x-forwarded-for", value.encode()) for value in forwarded])
    trusted = (ip_network("10.0.0.0/8"),)
    assert client_address({"type": "http", "client": (peer, 1)}, headers, trusted) == expected


@pytest.mark.sabotage(
    "app/api/exchange.py",
    "str(ip_network((parsed, 64), strict=False)) if isinstance(parsed, IPv6Address) else str(parsed)",
    "str(parsed)",
)
@pytest.mark.parametrize(
    ("address", "subject"),
    [
        ("198.51.100.1", "198.51.100.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::9", "2001:db8:1:2::/64"),
        ("::ffff:198.51.100.1", "198.51.100.1"),
        ("unknown", "unknown"),
    ],
)
def test_a_network_of_ipv6_addresses_counts_as_one_client(address: str, subject: str) -> None:
    assert limit_subject(address) == subject


@pytest.mark.sabotage(
    "app/api/exchange.py",
    "if not trusted or not within(address, trusted):",
    "if trusted and not within(address, trusted):",
)
def test_nobody_is_a_proxy_unless_a_setting_says_so() -> None:
    headers = Headers({"x-forwarded-for": "198.51.100.1"})
    assert client_address({"type": "http", "client": ("127.0.0.1", 1)}, headers, ()) == "127.0.0.1"
