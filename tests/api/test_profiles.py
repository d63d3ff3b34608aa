"""Profiles through NGINX: the two views, versions, conditional requests, change and erasure."""

from collections.abc import Awaitable, Callable
from typing import Any
from uuid import uuid4

import httpx
import pytest
from conftest import PASSWORD, Customer
from expectations import check_problem

Make = Callable[..., Awaitable[Customer]]
PUBLIC = {"id", "name", "bio", "tier", "avatar_url", "version", "created_at", "updated_at"}
OWN = PUBLIC | {"email", "location", "attributes"}


async def test_sign_up_answers_with_the_own_view_and_where_it_is(client: httpx.AsyncClient) -> None:
    body: dict[str, Any] = {
        "email": f"Ada.{uuid4().hex}@Example.com",
        "password": PASSWORD,
        "name": "  Ada Lovelace  ",
        "bio": "First\nprogrammer.",
        "location": {"lat": 51.5, "lon": -0.13},
        "attributes": {"language": "en", "age": 36, "score": 1.5, "newsletter": True},
    }
    answer = await client.post("/api/v1/profiles", json=body)
    assert answer.status_code == 201, answer.text
    own = answer.json()
    assert set(own) == OWN
    assert own["email"] == body["email"].lower()
    assert own["name"] == "Ada Lovelace"
    assert {name: own[name] for name in ("bio", "location", "attributes")} == {
        name: body[name] for name in ("bio", "location", "attributes")
    }
    assert (own["tier"], own["version"]) == ("free", 1)
    assert answer.headers["location"] == f"/api/v1/profiles/{own['id']}"
    assert answer.headers["etag"] == '"v1"'
    assert answer.headers["consistency-token"]
    assert answer.headers["cache-control"] == "no-store"
    assert PASSWORD not in answer.text


async def test_others_see_the_public_view_only(client: httpx.AsyncClient, new_customer: Make) -> None:
    customer = await new_customer(location={"lat": 1, "lon": 2}, attributes={"secret": "x"})
    answer = await client.get(f"/api/v1/profiles/{customer.profile['id']}")
    assert set(answer.json()) == PUBLIC
    assert customer.email not in answer.text
    assert answer.headers["cache-control"] == "private, no-cache"
    assert answer.headers["vary"] == "Authorization, Cookie"


async def test_a_reader_who_has_it_already_gets_304(client: httpx.AsyncClient, new_customer: Make) -> None:
    customer = await new_customer()
    path = f"/api/v1/profiles/{customer.profile['id']}"
    tag = (await client.get(path)).headers["etag"]
    unchanged = await client.get(path, headers={"If-None-Match": tag})
    assert (unchanged.status_code, unchanged.content) == (304, b"")
    assert unchanged.headers["etag"] == tag
    assert unchanged.headers["cache-control"] == "private, no-cache"
    head = await client.head(path)
    assert (head.status_code, head.content, head.headers["etag"]) == (200, b"", tag)


async def test_an_unknown_profile_is_404(client: httpx.AsyncClient) -> None:
    check_problem(await client.get(f"/api/v1/profiles/{uuid4()}"), 404, "not_found")


async def test_a_change_needs_the_version_that_was_read(new_customer: Make) -> None:
    customer = await new_customer()
    path = f"/api/v1/profiles/{customer.profile['id']}"
    change = {"bio": "New", "location": {"lat": 1, "lon": 2}, "attributes": {"a": 1}}
    check_problem(await customer.client.patch(path, json=change), 428, "precondition_required")
    for tag, status, code in (('"v9"', 412, "version_mismatch"), ("v1", 400, "invalid_if_match")):
        check_problem(await customer.client.patch(path, json=change, headers={"If-Match": tag}), status, code)
    changed = await customer.client.patch(path, json=change, headers={"If-Match": '"v1"'})
    assert changed.status_code == 200
    assert changed.headers["etag"] == '"v2"'
    assert {name: changed.json()[name] for name in change} == change
    again = await customer.client.patch(path, json=change, headers={"If-Match": '"v1"'})
    check_problem(again, 412, "version_mismatch")


async def test_null_clears_and_what_is_left_out_stays(new_customer: Make) -> None:
    customer = await new_customer(bio="Old", location={"lat": 1, "lon": 2}, attributes={"a": 1})
    path = f"/api/v1/profiles/{customer.profile['id']}"
    cleared = await customer.client.patch(path, json={"bio": None, "location": None}, headers={"If-Match": '"v1"'})
    assert cleared.json() | {"version": 1, "updated_at": None} == customer.profile | {
        "bio": None,
        "location": None,
        "updated_at": None,
    }


async def test_my_own_change_shows_in_my_next_reads(client: httpx.AsyncClient, new_customer: Make) -> None:
    customer = await new_customer()
    path = f"/api/v1/profiles/{customer.profile['id']}"
    tag = '"v1"'
    for number in range(5):
        changed = await customer.client.patch(path, json={"bio": f"{number}"}, headers={"If-Match": tag})
        tag = changed.headers["etag"]
        assert (await customer.client.get("/api/v1/profiles/me")).json()["bio"] == f"{number}"
        token = {"Consistency-Token": changed.headers["consistency-token"]}
        assert (await client.get(path, headers=token)).json()["bio"] == f"{number}"


@pytest.mark.sabotage("app/api/dependencies.py", "if session.profile_id != profile_id:", "if False:")
async def test_nobody_changes_or_erases_somebody_else(new_customer: Make) -> None:
    one, other = await new_customer(), await new_customer()
    path = f"/api/v1/profiles/{other.profile['id']}"
    headers = {"If-Match": '"v1"'}
    check_problem(await one.client.patch(path, json={"bio": "x"}, headers=headers), 403, "forbidden")
    check_problem(await one.client.delete(path, headers=headers), 403, "forbidden")
    assert (await other.client.get("/api/v1/profiles/me")).json() == other.profile


async def test_erasure_takes_the_data_and_the_sessions(client: httpx.AsyncClient, new_customer: Make) -> None:
    customer = await new_customer()
    path = f"/api/v1/profiles/{customer.profile['id']}"
    check_problem(await customer.client.delete(path), 428, "precondition_required")
    assert (await customer.client.delete(path, headers={"If-Match": '"v1"'})).status_code == 204
    check_problem(await customer.client.get("/api/v1/profiles/me"), 401, "invalid_token")
    check_problem(await client.get(path), 404, "not_found")
    signed_in = await client.post("/api/v1/sessions", json={"email": customer.email, "password": PASSWORD})
    check_problem(signed_in, 401, "invalid_credentials")
    anew = {"email": customer.email, "password": PASSWORD, "name": "Back"}
    assert (await client.post("/api/v1/profiles", json=anew)).status_code == 201


async def test_profiles_are_found_by_name_and_attribute_page_by_page(
    client: httpx.AsyncClient, new_customer: Make
) -> None:
    mark = uuid4().hex[:12]
    made = [await new_customer(name=f"{mark} {number}", attributes={"mark": mark}) for number in range(3)]
    newest_first = [customer.profile["id"] for customer in reversed(made)]
    for query in ({"name_prefix": mark.upper()}, {"attribute": f"mark:{mark}"}):
        first = (await client.get("/api/v1/profiles", params={**query, "limit": 2})).json()
        rest = (await client.get("/api/v1/profiles", params={**query, "cursor": first["next_cursor"]})).json()
        assert [found["id"] for found in first["items"] + rest["items"]] == newest_first
        assert rest["next_cursor"] is None
        assert set(first["items"][0]) == PUBLIC
