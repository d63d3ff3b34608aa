"""The limits of the edge in slowapi's words: its syntax, its `Limiter` as their list, its exception.

Only the check is not slowapi's. Its own holds the event loop for as long as its storage takes, and its middleware does
not find the routes of included routers; so each request is counted before a route is looked for, by one script in
Redis (`scaling/ratelimit.py`, `domain/sessions/admission.py`).
"""

from limits import parse
from slowapi import Limiter
from slowapi.errors import RateLimitExceeded
from slowapi.wrappers import Limit
from starlette.requests import Request
from starlette.types import Scope

from app.api.exchange import Exchange, exchange_of, limit_subject
from app.core.errors import RateLimited
from app.core.settings import RateSettings
from app.scaling.ratelimit import Policy, RateLimiter, Verdict, tiers_of


class Exceeded(RateLimitExceeded):
    """A request that does not fit; `error` is what its sender is told."""

    def __init__(self, verdict: Verdict) -> None:
        policy = verdict.policy
        item = parse(f"{policy.quota} per {policy.window} second")
        super().__init__(
            Limit(item, address_key, policy.name, False, None, None, None, 1, False)  # slowapi's order
        )
        self.error: RateLimited = verdict.error()


class Limits(Limiter):
    """All limits of an instance, where slowapi's users look for them: `app.state.limiter`.

    Args:
        rates: as set.
    """

    def __init__(self, rates: RateSettings) -> None:
        # It checks nothing by itself, so its storage stays empty.
        super().__init__(key_func=address_key, default_limits=[rates.anonymous], auto_check=False)
        self.anonymous = Policy.parse("anonymous", rates.anonymous)
        self.sign_in = Policy.parse("sign-in", rates.sign_in)
        self.tiers = tiers_of(rates)

    def tier(self, name: str) -> Policy:
        """Return the limit of a tier; of one without its own, that of the first."""
        return self.tiers.get(name) or next(iter(self.tiers.values()))

    async def count(self, exchange: Exchange, counter: RateLimiter, policy: Policy, subject: str) -> None:
        """Count a request of `subject` and note the verdict for its answer's headers.

        Raises:
            Exceeded: if it does not fit.
        """
        judge(exchange, await counter.take(policy, subject))


def judge(exchange: Exchange, verdict: Verdict) -> None:
    """Note a verdict on the exchange; of several, the one nearest to refusing is worth telling.

    Raises:
        Exceeded: if the request does not fit.
    """
    if exchange.verdict is None or not verdict.allowed or verdict.remaining < exchange.verdict.remaining:
        exchange.verdict = verdict
    if not verdict.allowed:
        raise Exceeded(verdict)


def limits_of(scope: Scope) -> Limits:
    """Return the limits of the application that serves this request."""
    limits: Limits = scope["app"].state.limiter
    return limits


def address_key(request: Request) -> str:
    """Return under what a stranger's request is counted; slowapi's `key_func`."""
    return limit_subject(exchange_of(request.scope).address)
