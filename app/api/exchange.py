"""One request and its answer, as the edge knows them: who called, from where, and what the answer must carry.

The first middleware makes an `Exchange`, the later ones and the routes fill it in. What stands in it goes out with
whatever answers in the end, a route or an error, so nobody has to wrap anybody to add a header.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from urllib.parse import urlsplit

from pydantic.networks import IPvAnyNetwork
from starlette.datastructures import Headers
from starlette.requests import cookie_parser
from starlette.types import Scope

from app.core.context import Work
from app.core.errors import TimedOut
from app.core.settings import ServiceSettings
from app.domain.sessions.rules import Session
from app.scaling.deadlines import Block
from app.scaling.ratelimit import Verdict
from app.wiring import Resources

SESSION_COOKIE = "session"
SAFE = frozenset({"GET", "HEAD", "OPTIONS"})  # methods that change nothing
_KEY = "scaleout.exchange"


@dataclass(slots=True)
class Exchange:
    """One request and its answer.

    Attributes:
        work: what the deeper rooms know of the request.
        address: the client's, as far as it can be believed.
        session: the caller's, or None for a stranger.
        verdict: what the rate limit said, for the headers of the answer.
        cookie: the value of `Set-Cookie`, if the answer sets or clears the session's.
        block: ends the request at its deadline; a route may ask for longer, see `last`.
        streamed: whether the answer goes on for as long as somebody listens, so that its duration says nothing.
    """

    work: Work
    address: str
    session: Session | None = None
    verdict: Verdict | None = None
    cookie: str | None = None
    block: Block | None = None
    streamed: bool = False

    def last(self, seconds: float) -> None:
        """Let the answer go on for so many seconds from now, instead of until the request's deadline."""
        self.streamed = True
        self.work.deadline = None
        if self.block is not None:
            self.block.postpone(asyncio.get_running_loop().time() + seconds)


def begin(scope: Scope, exchange: Exchange) -> None:
    """Attach `exchange` to the request."""
    scope[_KEY] = exchange


def exchange_of(scope: Scope) -> Exchange:
    """Return the exchange of a request that came through the middleware."""
    exchange: Exchange = scope[_KEY]
    return exchange


def resources_of(scope: Scope) -> Resources:
    """Return what the lifespan has opened for the application that serves this request."""
    resources: Resources = scope["app"].state.resources
    return resources


def timing_of(work: Work) -> bytes:
    """Return `Server-Timing`: who answered, and for how many milliseconds."""
    return ", ".join(
        f'{layer};desc="{span.description}";dur={span.milliseconds:.1f}' for layer, span in work.spans.items()
    ).encode()


def out_of_time() -> TimedOut:
    """Return the error of a request whose deadline has passed."""
    return TimedOut("The answer was not ready in time; look before you repeat a change.")


def bearer_of(headers: Headers) -> str | None:
    """Return the token of the Authorization header."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None


def cookie_of(headers: Headers) -> str | None:
    """Return the token of the session's cookie."""
    return session_in(headers.get("cookie", ""))


def token_in(headers: Mapping[bytes, bytes]) -> str | None:
    """Return the token of a request, where each header was sent once."""
    authorization, cookies = headers.get(b"authorization"), headers.get(b"cookie")
    if authorization is not None:
        is_bearer = authorization[:7].lower() == b"bearer "
        return authorization[7:].strip().decode("latin-1") if is_bearer else None
    return None if cookies is None else session_in(cookies.decode("latin-1"))


def session_in(cookies: str) -> str | None:
    """Return the token among the cookies of a request."""
    return cookie_parser(cookies).get(SESSION_COOKIE)


def client_address(scope: Scope, headers: Headers, trusted: tuple[IPvAnyNetwork, ...]) -> str:
    """Return the address that the request came from.

    That is the peer, unless the peer is a proxy of ours: then the last entry of `X-Forwarded-For` that is not one. The
    entries before it were written by whoever is outside, and count for nothing.
    """
    client = scope.get("client")
    address = client[0] if client else "unknown"
    if not trusted or not within(address, trusted):
        return address
    hops = [hop.strip() for value in headers.getlist("x-forwarded-for") for hop in value.split(",")]
    for hop in reversed(hops):
        try:
            address = str(ip_address(hop))
        except ValueError:  # our proxies write addresses only: from here on it is the outside speaking
            break
        if not within(address, trusted):
            break
    return address


# Those of the last moments, as below.
@lru_cache(maxsize=4096)
def limit_subject(address: str) -> str:
    """Return under what an address is counted: itself, or the /64 that it is in.

    Whoever has one IPv6 address has 2**64 of them; counted one by one they would have as many limits.
    """
    parsed = _parse(address)
    if parsed is None:
        return address
    return str(ip_network((parsed, 64), strict=False)) if isinstance(parsed, IPv6Address) else str(parsed)


# Addresses of balancers and of the callers of the last moments; reading one and comparing it costs as much as a route.
@lru_cache(maxsize=4096)
def within(address: str, networks: tuple[IPvAnyNetwork, ...]) -> bool:
    """Return whether the address is in one of the networks; what is no address is in none."""
    parsed = _parse(address)
    return parsed is not None and any(parsed in network for network in networks)


def _parse(address: str) -> IPv4Address | IPv6Address | None:
    try:
        parsed = ip_address(address)
    except ValueError:  # a Unix socket has no address
        return None
    # A socket for both families shows IPv4 clients as ::ffff:198.51.100.1, all of them in one /64.
    return (parsed.ipv4_mapped or parsed) if isinstance(parsed, IPv6Address) else parsed


def session_cookie(token: str, seconds: int, settings: ServiceSettings) -> str:
    """Return the `Set-Cookie` value that gives the browser `token` for so many seconds; none at all clears it."""
    secure = "; Secure" if is_https(settings) else ""
    return f"{SESSION_COOKIE}={token}; Max-Age={seconds}; Path=/; HttpOnly; SameSite=Lax{secure}"


def is_https(settings: ServiceSettings) -> bool:
    """Return whether clients reach this service over TLS."""
    return urlsplit(settings.public_url).scheme == "https"
