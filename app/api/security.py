"""The headers that both ways through the edge, the long and the hot one, put on every answer alike.

One place, so that an answer does not depend on the way that it took.
"""

from app.api.exchange import is_https
from app.core.settings import ServiceSettings

# An API's answers are data: whatever a browser is made to see in one, it runs nothing. /docs sets its own.
CONTENT_POLICY = (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'")
# Of every answer that depends on the caller.
VARY = (b"vary", b"Authorization, Cookie")

_SECURITY = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),  # for browsers that do not know frame-ancestors
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"accelerometer=(), camera=(), geolocation=(), microphone=()"),
)
# Two years, as browsers' preload lists ask for.
_HSTS = (b"strict-transport-security", b"max-age=63072000; includeSubDomains")


def fixed_headers(settings: ServiceSettings) -> list[tuple[bytes, bytes]]:
    """Return the headers that every answer of this instance has."""
    fixed = [*_SECURITY, (b"x-instance", settings.instance.encode())]
    return [*fixed, _HSTS] if is_https(settings) else fixed
