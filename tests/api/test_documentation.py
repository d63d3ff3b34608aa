"""The documentation: nothing from another host, every error a problem, every route with a name of its own."""

import re
from pathlib import Path
from typing import Any

import httpx
import pytest


@pytest.fixture
async def schema(client: httpx.AsyncClient) -> dict[str, Any]:
    """The OpenAPI document."""
    answer = await client.get("/openapi.json")
    assert answer.headers["content-type"] == "application/json"
    described: dict[str, Any] = answer.json()
    return described


def operations(schema: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [(method, path, found) for path, item in schema["paths"].items() for method, found in item.items()]


@pytest.mark.sabotage(
    path="app/api/documentation.py",
    take_out='src="/docs/swagger-ui-bundle.js"',
    put='src="https://cdn.example/swagger-ui-bundle.js"',
)
async def test_the_page_loads_nothing_from_another_host(client: httpx.AsyncClient) -> None:
    page = await client.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    links = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(links) == 4
    for link in links:
        assert link.startswith("/docs/")
        asset = await client.get(link)
        assert asset.status_code == 200
        assert asset.headers["cache-control"] == "public, max-age=3600"
    assert "//" not in page.text.replace("<!DOCTYPE html>", "")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'; script-src 'self';" in policy
    assert "http" not in policy


async def test_every_route_of_this_release_is_documented(schema: dict[str, Any]) -> None:
    found = {f"{method.upper()} {path}" for method, path, _ in operations(schema)}
    assert found == {
        "POST /api/v1/profiles",
        "GET /api/v1/profiles",
        "GET /api/v1/profiles/me",
        "GET /api/v1/profiles/{profile_id}",
        "PATCH /api/v1/profiles/{profile_id}",
        "DELETE /api/v1/profiles/{profile_id}",
        "POST /api/v1/sessions",
        "GET /api/v1/sessions",
        "DELETE /api/v1/sessions",
        "DELETE /api/v1/sessions/current",
        "GET /api/v1/products",
        "POST /api/v1/products",
        "GET /api/v1/products/search",
        "GET /api/v1/products/{product_id}",
        "PATCH /api/v1/products/{product_id}",
        "POST /api/v1/orders",
        "GET /api/v1/orders",
        "GET /api/v1/orders/{order_id}",
        "GET /api/v1/orders/{order_id}/events",
        "GET /api/v1/orders/{order_id}/invoice",
        "POST /api/v1/orders/{order_id}/cancel",
        "GET /api/v1/products/{product_id}/recommendations",
        "POST /api/v1/reports",
        "GET /api/v1/jobs/{job_id}",
        "POST /api/v1/jobs/{job_id}/cancel",
        "GET /api/v1/admin/dead-letters",
        "POST /api/v1/admin/dead-letters/{letter_id}/replay",
        "GET /api/v1/admin/shards",
        "GET /api/v1/admin/breakers",
        "GET /files/{signed}",
        "PUT /files/{signed}",
        "PUT /api/v1/profiles/{profile_id}/avatar",
        "GET /api/v1/assets/{key}",
        "GET /health",
        "GET /health/live",
        "GET /health/ready",
        "GET /health/startup",
    }


@pytest.mark.sabotage("docs/api.md", "| `GET /api/v1/orders` |", "| `GET /api/v1/offers` |")
async def test_the_page_of_the_api_lists_every_route(schema: dict[str, Any]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `([A-Z]+ /[^`]*)` \|", page, re.MULTILINE)
    assert sorted(listed) == sorted(f"{method.upper()} {path}" for method, path, _ in operations(schema))


async def test_operations_have_names_summaries_and_tags(schema: dict[str, Any]) -> None:
    names = [found["operationId"] for _, _, found in operations(schema)]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z][A-Za-z]+", name) for name in names)
    assert all(found["summary"] and found["description"] and found["tags"] for _, _, found in operations(schema))


async def test_every_error_is_documented_as_a_problem(schema: dict[str, Any]) -> None:
    for method, path, found in operations(schema):
        for status, answer in found["responses"].items():
            if int(status) >= 400:
                assert list(answer["content"]) == ["application/problem+json"], (method, path, status)
                assert answer["content"]["application/problem+json"]["schema"]["$ref"].endswith("/Problem")
    assert {"Problem", "FieldProblem"} <= set(schema["components"]["schemas"])
    assert "HTTPValidationError" not in str(schema)


async def test_routes_say_who_may_call_them(schema: dict[str, Any]) -> None:
    assert set(schema["components"]["securitySchemes"]) == {"Bearer", "Cookie"}
    secured = {f"{method.upper()} {path}" for method, path, found in operations(schema) if found.get("security")}
    assert "POST /api/v1/orders" in secured
    assert "GET /api/v1/profiles/me" in secured
    assert "GET /api/v1/products" not in secured
    for method, path, found in operations(schema):
        if f"{method.upper()} {path}" in secured:
            assert "401" in found["responses"], (method, path)


async def test_no_reference_leads_nowhere(schema: dict[str, Any]) -> None:
    for reference in re.findall(r"'\$ref': '#/components/schemas/([^']+)'", str(schema)):
        assert reference in schema["components"]["schemas"]


async def test_headers_without_which_a_call_is_refused_are_documented_as_required(schema: dict[str, Any]) -> None:
    for method, path, name in (
        ("post", "/api/v1/orders", "Idempotency-Key"),
        ("patch", "/api/v1/profiles/{profile_id}", "If-Match"),
        ("patch", "/api/v1/products/{product_id}", "If-Match"),
    ):
        parameters = {found["name"]: found for found in schema["paths"][path][method]["parameters"]}
        assert parameters[name]["required"], (method, path)
