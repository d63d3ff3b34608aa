"""Every error as `application/problem+json` (RFC 9457), whoever raised it: us, the validation, the router, or a bug.

One table turns a kind of error into a status; codes that HTTP has a better number for stand beside it. A problem names
the request and the broken fields, never what was in them, and nothing of how the service is built.
"""

from collections.abc import Iterable, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import iter_route_contexts
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from app.api.limits import Exceeded
from app.core import context, wire
from app.core.errors import FieldError, Invalid, Kind, ServiceError

MEDIA_TYPE = "application/problem+json"
# A body with 10,000 broken items is told of the first few; more help nobody and would make the answer a weapon.
MOST_FIELDS = 20
LONGEST_POINTER = 200  # characters; a field's name comes from the client and may be as long as the body

STATUS = {
    Kind.INVALID: 422,
    Kind.UNAUTHENTICATED: 401,
    Kind.FORBIDDEN: 403,
    Kind.NOT_FOUND: 404,
    Kind.CONFLICT: 409,
    Kind.PRECONDITION_FAILED: 412,
    Kind.PRECONDITION_REQUIRED: 428,
    Kind.TOO_LARGE: 413,
    Kind.RATE_LIMITED: 429,
    Kind.TIMED_OUT: 504,
    Kind.UNAVAILABLE: 503,
}
# Invalid, but not as a body that was understood and breaks a rule.
STATUS_OF_CODE = {
    "invalid_json": 400,
    "invalid_cursor": 400,
    "invalid_consistency_token": 400,
    "invalid_if_match": 400,
    "invalid_last_event_id": 400,
    "idempotency_key_missing": 400,
    "idempotency_key_invalid": 400,
    "unsupported_media_type": 415,
}
# What the router and the framework raise on their own.
_FRAMEWORK = {
    400: ("bad_request", "The request cannot be read."),
    404: ("not_found", "There is nothing at this address."),
    405: ("method_not_allowed", "This method is not allowed here; Allow names those that are."),
    413: ("payload_too_large", "The body is too large."),
}
# RFC 9110's names; Python before 3.13 has the ones of its predecessors.
_TITLES = {413: "Content Too Large", 422: "Unprocessable Content"}
_ADVICE = {
    "missing": "This is required.",
    "extra_forbidden": "There is no such field; leave it out.",
    "uuid_parsing": "Must be a UUID.",
    "uuid_type": "Must be a UUID, as a string.",
    "model_attributes_type": "Must be a JSON object.",
    "model_type": "Must be a JSON object.",
    "dict_type": "Must be a JSON object.",
    "list_type": "Must be a JSON array.",
}


class FieldProblem(BaseModel):
    """One broken field: where it is and what to do about it."""

    pointer: str = Field(
        description="JSON pointer into the body, or query/name, path/name, header/Name.", examples=["/items/0/quantity"]
    )
    detail: str = Field(examples=["Input should be greater than or equal to 1"])


class Problem(BaseModel):
    """An error, as every error of this API looks (RFC 9457)."""

    type: str = Field(examples=["about:blank"])
    title: str = Field(examples=["Unprocessable Content"])
    status: int = Field(examples=[422])
    detail: str = Field(description="One sentence for a person.", examples=["The request has 1 field to correct."])
    code: str = Field(description="The stable name of the error, for programs.", examples=["invalid"])
    request_id: str = Field(description="Names the request in the logs.", examples=["0f6b1c9a4e7d4f0c9d1f6a3b2c5e8d70"])
    errors: list[FieldProblem] | None = Field(default=None, description="The broken fields, where there are any.")


def status_of(error: ServiceError) -> int:
    """Return the HTTP status of an error of ours."""
    return STATUS_OF_CODE.get(error.code) or STATUS[error.kind]


def answer(error: ServiceError) -> Response:
    """Return the answer to an error of ours."""
    status = status_of(error)
    headers = {}
    if status in {HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE}:
        headers["Retry-After"] = str(error.retry_after or 1)
    if status == HTTPStatus.UNAUTHORIZED:
        challenge = ', error="invalid_token"' if error.code == "invalid_token" else ""
        headers["WWW-Authenticate"] = f'Bearer realm="scaleout"{challenge}'
    return _problem(status, error.code, error.detail, fields=error.fields, headers=headers)


def unexpected() -> Response:
    """Return the answer to a bug: nothing but the request's id, by which the log tells the rest."""
    return _problem(500, "internal_error", "Something went wrong on our side; the request id finds it in our logs.")


def unreadable() -> Response:
    """Return the answer to bytes that are no HTTP request."""
    return _problem(400, "bad_request", "This is not an HTTP request that can be read; look for control characters.")


def install(app: FastAPI) -> None:
    """Make `app` answer the errors of its routes and its router as problems."""

    async def ours(_request: Request, error: Exception) -> Response:
        if not isinstance(error, ServiceError):
            raise error
        return answer(error)

    async def limited(_request: Request, error: Exception) -> Response:
        if not isinstance(error, Exceeded):
            raise error
        return answer(error.error)

    async def validation(_request: Request, error: Exception) -> Response:
        if not isinstance(error, RequestValidationError):
            raise error
        return answer(broken(error.errors()))

    async def framework(request: Request, error: Exception) -> Response:
        if not isinstance(error, HTTPException):
            raise error
        code, detail = _FRAMEWORK.get(error.status_code, ("error", HTTPStatus(error.status_code).phrase))
        headers = dict(error.headers or {})
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            headers["Allow"] = ", ".join(_allowed(app, request))
        return _problem(error.status_code, code, detail, headers=headers)

    app.add_exception_handler(ServiceError, ours)
    app.add_exception_handler(Exceeded, limited)
    app.add_exception_handler(RequestValidationError, validation)
    app.add_exception_handler(HTTPException, framework)


def broken(errors: Sequence[Mapping[str, Any]]) -> Invalid:
    """Return the error that names the fields which pydantic refused, without what was in them."""
    fields = tuple(FieldError(_pointer(error["loc"]), _advice(error)) for error in errors[:MOST_FIELDS])
    number = "1 field" if len(errors) == 1 else f"{len(errors)} fields"
    return Invalid(f"The request has {number} to correct.", fields=fields)


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the documentation of problem responses, for `responses=` of a route or a router."""
    schema = {"$ref": "#/components/schemas/Problem"}
    return {status: {"description": _title(status), "content": {MEDIA_TYPE: {"schema": schema}}} for status in statuses}


def _allowed(app: FastAPI, request: Request) -> list[str]:
    # Each method of a path is a route of its own, and the router's own answer names only those of the first.
    path = getattr(request.scope.get("route"), "path", None)
    methods: set[str] = set()
    for route in iter_route_contexts(app.routes):
        if route.path == path:
            methods |= route.methods or set()
    return sorted(methods | ({"HEAD"} if "GET" in methods else set()))


def _pointer(location: Iterable[int | str]) -> str:
    source, *path = location
    steps = [str(step) for step in path if step != "[key]"]
    if source != "body":
        return "/".join([str(source), *steps])[:LONGEST_POINTER]
    return "".join(f"/{step.replace('~', '~0').replace('/', '~1')}" for step in steps)[:LONGEST_POINTER]


def _advice(error: Mapping[str, Any]) -> str:
    # pydantic's own message of a bad UUID quotes it; what a client sent is not for answers that end up in logs.
    return _ADVICE.get(error["type"]) or str(error["msg"]).removeprefix("Value error, ")


def _title(status: int) -> str:
    return _TITLES.get(status) or HTTPStatus(status).phrase


def _problem(
    status: int,
    code: str,
    detail: str,
    *,
    fields: tuple[FieldError, ...] = (),
    headers: Mapping[str, str] | None = None,
) -> Response:
    body: dict[str, Any] = {
        "type": "about:blank",
        "title": _title(status),
        "status": status,
        "detail": detail,
        "code": code,
        "request_id": context.current().request_id,
    }
    if fields:
        body["errors"] = [{"pointer": field.pointer, "detail": field.detail} for field in fields]
    return Response(wire.encode(body), status, headers, MEDIA_TYPE)
