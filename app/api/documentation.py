"""`/docs` and `/openapi.json`: the contract as an engineer reads it first, with nothing loaded from another host.

Swagger UI comes from a package on this machine, and its page allows scripts, styles and calls of this origin only. The
schema knows the problem document, the headers that every answer has, and who may call what.
"""

from functools import cache
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi

from app.api.problems import Problem, responses
from app.api.representations import CACHING, written

router = APIRouter(include_in_schema=False)

DESCRIPTION = """
Profiles, products and orders, served by any number of instances.

**Try it:** sign in with `POST /api/v1/sessions`, press *Authorize*, paste the token as *Bearer*.

- **Errors** are `application/problem+json`; branch on `code`, show `detail`, log `request_id`.
- **Lists** give `next_cursor`; send it as `cursor` for the next page.
- **Changes** name the version that you have read: send its `ETag` as `If-Match`.
- **After a write** send the `Consistency-Token` of the answer with your next reads and they see it on every instance;
  signed-in callers get that without it.
"""

TAGS = [
    {"name": "Profiles", "description": "Sign up, look at profiles, change and erase your own."},
    {"name": "Sessions", "description": "Sign in and out."},
    {"name": "Catalog", "description": "Products: browse, search, and edit as an administrator."},
    {"name": "Orders", "description": "Place orders, follow them, fetch invoices."},
    {"name": "Reports", "description": "Reports as jobs, for administrators."},
    {
        "name": "Administration",
        "description": "Dead letters, shards and breakers, for administrators at allowed addresses.",
    },
    {"name": "Files", "description": "Stored files behind short-lived links."},
    {"name": "Health", "description": "Probes."},
]

# Swagger UI sets style attributes and inlines its icons as data; nothing else leaves the default of nothing.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>scaleout API</title>
<link rel="icon" href="/docs/favicon.png">
<link rel="stylesheet" href="/docs/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="/docs/swagger-ui-bundle.js"></script>
<script src="/docs/start.js"></script>
</body>
</html>
"""
# Without a validator: Swagger UI's default sends the schema's address to a host on the internet.
_START = """SwaggerUIBundle({
  url: "/openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  displayRequestDuration: true,
  persistAuthorization: false,
  validatorUrl: null,
  presets: [SwaggerUIBundle.presets.apis],
});
"""
_ASSETS = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "favicon.png": "image/png",
}


@router.get("/docs")
async def page() -> Response:
    """Return the page."""
    return Response(_PAGE, headers={"Content-Security-Policy": _POLICY}, media_type="text/html")


@router.get("/docs/start.js")
async def start() -> Response:
    """Return the script that starts Swagger UI; a file of its own, so that the page needs no inline script."""
    return Response(_START, headers={"Cache-Control": CACHING["documentation"]}, media_type="text/javascript")


@router.get("/openapi.json")
async def schema(request: Request) -> Response:
    """Return the OpenAPI document."""
    return written(request.app.openapi())


def _serve(name: str, media_type: str) -> None:
    @router.get(f"/docs/{name}", name=name)
    async def asset() -> Response:
        return Response(_asset(name), headers={"Cache-Control": CACHING["documentation"]}, media_type=media_type)


for _name, _media_type in _ASSETS.items():
    _serve(_name, _media_type)


@cache
def _asset(name: str) -> bytes:
    return files("fastapi_offline").joinpath("static", name).read_bytes()


def install(app: FastAPI) -> None:
    """Make `app` describe itself with the problem document and the headers of every answer."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _describe(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # as FastAPI documents it, "Extending OpenAPI"


def _describe(app: FastAPI) -> dict[str, Any]:
    described = get_openapi(
        title=app.title,
        version=app.version,
        description=DESCRIPTION,
        tags=TAGS,
        routes=app.routes,
        license_info={"name": "MIT", "identifier": "MIT"},
    )
    components = described["components"]["schemas"]
    problem = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
    components |= problem.pop("$defs")
    components["Problem"] = problem
    for unused in ("HTTPValidationError", "ValidationError"):  # FastAPI's own error, which this API never sends
        components.pop(unused, None)
    # The balancer's answers; it knows no operations, so they are those of every one.
    too_long = {str(status): response for status, response in responses(414, 431).items()}
    for item in described["paths"].values():
        for operation in item.values():
            operation["responses"] |= too_long
            for parameter in operation.get("parameters", ()):
                # Optional to the framework, because a missing one has an error of its own and not the validation's.
                parameter["required"] = parameter["required"] or parameter["name"] in {"Idempotency-Key", "If-Match"}
                parameter["schema"] = _without_null(parameter["schema"])
    return described


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a parameter that may be left out: nobody can write null in an address or a header."""
    types = [one for one in schema.get("anyOf", ()) if one != {"type": "null"}]
    rest = {name: value for name, value in schema.items() if name != "anyOf"}
    return {**types[0], **rest} if len(types) == 1 else schema
