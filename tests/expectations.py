"""What tests of the HTTP edge expect of every answer, in unit tests as through NGINX."""

from typing import Any

import httpx


def check_problem(answer: httpx.Response, status: int, code: str, *pointers: str) -> dict[str, Any]:
    """Expect a problem document with this status and code that names exactly these fields, and return it."""
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json"), answer.text
    body: dict[str, Any] = answer.json()
    assert set(body) - {"errors"} == {"type", "title", "status", "detail", "code", "request_id"}
    assert (body["status"], body["code"]) == (status, code)
    assert body["request_id"] == answer.headers["x-request-id"]
    assert ("retry-after" in answer.headers) == (status in {429, 503})
    if pointers:
        assert [error["pointer"] for error in body["errors"]] == list(pointers)
    return body
