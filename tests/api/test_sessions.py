"""Signing in and out: tokens, cookies, what other sites may not do with them, and who may call what."""

from collections.abc import Awaitable, Callable
from http.cookies import SimpleCookie
from uuid import uuid4

import httpx
import pytest
from conftest import PASSWORD, Customer
from expectations import check_problem

from deploy.local.cluster import Cluster

Make = Callable[..., Awaitable[Customer]]
FOREIGN = "sct_" + "A" * 64


async def test_the_cookie_is_for_this_site_and_not_for_scripts(client: httpx.AsyncClient, new_customer: Make) -> None:
    customer = await new_customer()
    answer = await client.post("/api/v1/sessions", json={"email": customer.email, "password": PASSWORD})
    assert answer.status_code == 201
    cookie = SimpleCookie(answer.headers["set-cookie"])["session"]
    assert cookie.value == answer.json()["token"]
    assert cookie["httponly"]
    assert (cookie["samesite"], cookie["path"], cookie["max-age"]) == ("Lax", "/", str(30 * 24 * 3600))
    assert not cookie["secure"]  # the cluster speaks http; with an https PUBLIC_URL it is
    assert answer.headers["cache-control"] == "no-store"
    assert (await client.get("/api/v1/profiles/me")).json()["id"] == customer.profile["id"]


async def test_case_and_spelling_of_an_address_are_one_account(client: httpx.AsyncClient, new_customer: Make) -> None:
    customer = await new_customer()
    shouted = customer.email.upper()
    assert (await client.post("/api/v1/sessions", json={"email": shouted, "password": PASSWORD})).status_code == 201
    client.cookies.clear()
    again = {"email": shouted, "password": PASSWORD, "name": "Impostor"}
    check_problem(await client.post("/api/v1/profiles", json=again), 409, "email_taken")


async def test_an_unknown_address_and_a_wrong_password_are_told_alike(
    client: httpx.AsyncClient, new_customer: Make
) -> None:
    customer = await new_customer()
    wrong = await client.post("/api/v1/sessions", json={"email": customer.email, "password": "not the pass phrase"})
    unknown = await client.post("/api/v1/sessions", json={"email": "nobody@example.com", "password": PASSWORD})
    told = check_problem(wrong, 401, "invalid_credentials")
    assert told["detail"] == check_problem(unknown, 401, "invalid_credentials")["detail"]
    assert "set-cookie" not in wrong.headers


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/api/v1/profiles/me"),
        ("GET", "/api/v1/sessions"),
        ("DELETE", "/api/v1/sessions"),
        ("DELETE", "/api/v1/sessions/current"),
        ("GET", "/api/v1/orders"),
        ("POST", "/api/v1/orders"),
        ("GET", f"/api/v1/orders/{uuid4()}"),
        ("GET", f"/api/v1/orders/{uuid4()}/invoice"),
        ("PATCH", f"/api/v1/profiles/{uuid4()}"),
        ("DELETE", f"/api/v1/profiles/{uuid4()}"),
        ("POST", "/api/v1/products"),
        ("PATCH", f"/api/v1/products/{uuid4()}"),
    ],
)
async def test_strangers_are_asked_to_sign_in(client: httpx.AsyncClient, method: str, path: str) -> None:
    answer = await client.request(method, path, json={} if method in {"POST", "PATCH"} else None)
    check_problem(answer, 401, "unauthenticated")
    assert answer.headers["www-authenticate"] == 'Bearer realm="scaleout"'


@pytest.mark.parametrize("token", [FOREIGN, "x", "sct_", "", "sct_" + "é" * 64, "sct_" + "A" * 5000])
async def test_a_token_that_is_not_valid_is_refused_even_where_none_is_needed(
    client: httpx.AsyncClient, token: str
) -> None:
    answer = await client.get("/api/v1/products", headers={"Authorization": f"Bearer {token}".strip().encode()})
    check_problem(answer, 401, "invalid_token")
    assert 'error="invalid_token"' in answer.headers["www-authenticate"]


async def test_a_cookie_that_is_not_valid_is_a_strangers_and_is_cleared(client: httpx.AsyncClient) -> None:
    answer = await client.get("/api/v1/products", headers={"Cookie": f"session={FOREIGN}"})
    assert answer.status_code == 200
    cookie = SimpleCookie(answer.headers["set-cookie"])["session"]
    assert (cookie.value, cookie["max-age"]) == ("", "0")
    assert answer.headers["cache-control"] == "private, no-cache"  # no shared cache may hand the cookie on
    assert answer.headers["vary"] == "Authorization, Cookie"


@pytest.mark.sabotage(path="app/api/middleware.py", take_out="if not genuine:", put="if False:")
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": ""}, 403),
        ({"Origin": "http://["}, 403),
        ({"Origin": "https://evil.example", "Sec-Fetch-Site": "same-origin"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
        ({"Origin": "{url}"}, 200),
    ],
)
async def test_another_site_cannot_use_the_cookie(
    cluster: Cluster, new_customer: Make, client: httpx.AsyncClient, headers: dict[str, str], status: int
) -> None:
    customer = await new_customer()
    path = f"/api/v1/profiles/{customer.profile['id']}"
    answer = await client.patch(
        path,
        json={"bio": "changed"},
        headers={
            "If-Match": '"v1"',
            "Cookie": f"session={customer.token}",
            **{name: value.format(url=cluster.url) for name, value in headers.items()},
        },
    )
    if status == 200:
        assert answer.status_code == 200, answer.text
    else:
        check_problem(answer, 403, "csrf_rejected")
        assert (await customer.client.get("/api/v1/profiles/me")).json()["bio"] is None


async def test_the_cookie_reads_without_an_origin_and_the_token_wins_over_it(
    client: httpx.AsyncClient, new_customer: Make
) -> None:
    one, other = await new_customer(), await new_customer()
    cookie = {"Cookie": f"session={one.token}"}
    assert (await client.get("/api/v1/profiles/me", headers=cookie)).json()["id"] == one.profile["id"]
    both = cookie | {"Authorization": f"bearer {other.token}"}
    assert (await client.get("/api/v1/profiles/me", headers=both)).json()["id"] == other.profile["id"]


async def test_sessions_are_listed_and_the_current_one_is_marked(client: httpx.AsyncClient, new_customer: Make) -> None:
    customer = await new_customer()
    again = await client.post(
        "/api/v1/sessions",
        json={"email": customer.email, "password": PASSWORD},
        headers={"User-Agent": "Phone/1.0\t" + "x" * 400},
    )
    assert again.status_code == 201
    items = (await customer.client.get("/api/v1/sessions")).json()["items"]
    assert [found["current"] for found in items] == [False, True]
    assert items[0]["user_agent"].startswith("Phone/1.0")
    assert set(items[0]) == {"id", "user_agent", "created_at", "last_seen_at", "expires_at", "current"}
    assert customer.token not in str(items)


async def test_signing_out_ends_this_session_and_clears_the_cookie(
    client: httpx.AsyncClient, new_customer: Make
) -> None:
    customer = await new_customer()
    other = (await client.post("/api/v1/sessions", json={"email": customer.email, "password": PASSWORD})).json()[
        "token"
    ]
    answer = await customer.client.delete("/api/v1/sessions/current")
    assert (answer.status_code, answer.content) == (204, b"")
    assert SimpleCookie(answer.headers["set-cookie"])["session"]["max-age"] == "0"
    check_problem(await customer.client.get("/api/v1/profiles/me"), 401, "invalid_token")
    client.cookies.clear()
    still = await client.get("/api/v1/profiles/me", headers={"Authorization": f"Bearer {other}"})
    assert still.status_code == 200


async def test_signing_out_everywhere_ends_all(client: httpx.AsyncClient, new_customer: Make) -> None:
    customer = await new_customer()
    other = (await client.post("/api/v1/sessions", json={"email": customer.email, "password": PASSWORD})).json()[
        "token"
    ]
    client.cookies.clear()
    assert (await customer.client.delete("/api/v1/sessions")).status_code == 204
    for token in (customer.token, other):
        answer = await client.get("/api/v1/profiles/me", headers={"Authorization": f"Bearer {token}"})
        check_problem(answer, 401, "invalid_token")
