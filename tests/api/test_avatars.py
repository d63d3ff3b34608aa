"""Avatars through NGINX, as a client sees them: announced, uploaded, shown, kept by caches, erased."""

import io
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import uuid4

import httpx
import pytest
from conftest import PATIENCE, Customer, until
from expectations import check_problem
from PIL import Image

Make = Callable[..., Awaitable[Customer]]


def photo() -> bytes:
    """Return a picture that is larger than any other body may be."""
    out = io.BytesIO()
    Image.effect_noise((700, 500), 90).save(out, "PNG")
    return out.getvalue()


async def announce(customer: Customer, content_type: str = "image/png", size: int = 1000) -> dict[str, Any]:
    path = f"/api/v1/profiles/{customer.profile['id']}/avatar"
    answer = await customer.client.put(path, json={"content_type": content_type, "size": size})
    assert answer.status_code == 201, answer.text
    link: dict[str, Any] = answer.json()
    assert (link["method"], link["headers"]) == ("PUT", {"Content-Type": content_type})
    return link


@pytest.fixture
async def wearer(new_customer: Make, client: httpx.AsyncClient) -> Customer:
    """A customer with an avatar."""
    customer, content = await new_customer(), photo()
    link = await announce(customer, size=len(content))
    assert len(content) > 100_000
    (await client.put(link["upload_url"], content=content, headers=link["headers"])).raise_for_status()

    async def shown() -> dict[str, Any] | None:
        own = (await customer.client.get("/api/v1/profiles/me")).json()
        return own if own["avatar_url"] else None

    return Customer(customer.client, await until(shown, seconds=2 * PATIENCE), customer.email, customer.token)


@pytest.mark.sabotage(
    "app/api/assets.py", 'if has(request.headers.get("if-none-match"), headers["ETag"]):', "if False:"
)
async def test_an_avatar_is_shown_to_everybody_and_may_be_kept(wearer: Customer, client: httpx.AsyncClient) -> None:
    path = wearer.profile["avatar_url"]
    public = (await client.get(f"/api/v1/profiles/{wearer.profile['id']}")).json()
    assert public["avatar_url"] == path
    lead = await client.get(path)
    assert (lead.status_code, lead.headers["cache-control"]) == (302, "public, max-age=86400, immutable")
    assert lead.headers["etag"].strip('"') in path
    again = await client.get(path, headers={"If-None-Match": lead.headers["etag"]})
    assert (again.status_code, again.headers["etag"]) == (304, lead.headers["etag"])
    file = await client.get(lead.headers["location"])
    assert (file.status_code, file.headers["content-type"]) == (200, "image/webp")
    assert file.headers["cache-control"] == "public, max-age=86400, immutable"
    with Image.open(io.BytesIO(file.content)) as image:
        assert max(image.size) == 512


@pytest.mark.sabotage(
    "app/api/assets.py", 'shown is None or wire.decode(shown)["avatar_url"] != request.url.path:', "False:"
)
async def test_an_avatar_goes_with_its_profile(wearer: Customer, client: httpx.AsyncClient) -> None:
    path = wearer.profile["avatar_url"]
    address = (await client.get(path)).headers["location"]
    version = {"If-Match": f'"v{wearer.profile["version"]}"'}
    assert (await wearer.client.delete(f"/api/v1/profiles/{wearer.profile['id']}", headers=version)).status_code == 204
    check_problem(await client.get(path), 404, "not_found")

    async def gone() -> bool:
        return (await client.get(address)).status_code == 404

    await until(gone)


async def test_an_upload_is_held_to_what_was_announced(new_customer: Make, client: httpx.AsyncClient) -> None:
    link = await announce(await new_customer(), size=10)
    put = link["upload_url"]
    check_problem(
        await client.put(put, content=b"x", headers={"Content-Type": "text/html"}),
        422,
        "invalid",
        "header/Content-Type",
    )
    check_problem(await client.put(put, content=b"x" * 11, headers=link["headers"]), 413, "payload_too_large")
    check_problem(await client.put(put, content=b"x" * 6_000_000, headers=link["headers"]), 413, "payload_too_large")
    check_problem(await client.put(f"{put}x", content=b"x", headers=link["headers"]), 404, "link_expired")
    check_problem(await client.get(put), 404, "link_expired")


async def test_nobody_changes_somebody_elses_avatar(new_customer: Make, client: httpx.AsyncClient) -> None:
    one, other = await new_customer(), await new_customer()
    path, body = f"/api/v1/profiles/{one.profile['id']}/avatar", {"content_type": "image/png", "size": 1}
    check_problem(await other.client.put(path, json=body), 403, "forbidden")
    check_problem(await client.put(path, json=body), 401, "unauthenticated")


@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({"content_type": "image/svg+xml"}, "/content_type"),
        ({"content_type": None}, "/content_type"),
        ({"size": 0}, "/size"),
        ({"size": 5 * 1024 * 1024 + 1}, "/size"),
        ({"size": "10"}, "/size"),
        ({"size": 1.5}, "/size"),
        ({"key": "avatars/x"}, "/key"),
    ],
)
async def test_a_bad_announcement_names_the_field(new_customer: Make, fields: dict[str, Any], pointer: str) -> None:
    customer = await new_customer()
    path = f"/api/v1/profiles/{customer.profile['id']}/avatar"
    answer = await customer.client.put(path, json={"content_type": "image/png", "size": 10} | fields)
    check_problem(answer, 422, "invalid", pointer)


@pytest.mark.parametrize(
    "key",
    [
        "nothing",
        f"avatars/{uuid4()}/{'0' * 32}.webp",
        f"avatars/{uuid4()}/../../{'0' * 32}.webp",
        "invoices/x.pdf",
        "%2e%2e/secret",
    ],
)
async def test_no_other_object_is_an_asset(client: httpx.AsyncClient, key: str) -> None:
    check_problem(await client.get(f"/api/v1/assets/{key}"), 404, "not_found")
