"""Rate limits over all instances: one atomic script in Redis, never over the limit however many instances there are.

A window opens with a caller's first request and closes after its period; the limit is counted inside it. While Redis is
down each instance counts for itself, a share of the limit, so that an outage neither opens the gates nor shuts them.
"""

import time
from collections import OrderedDict
from dataclasses import dataclass

import limits

from app.core.errors import RateLimited
from app.core.settings import RateSettings
from app.core.telemetry import LIMITED_LOCALLY, RATE_LIMITED
from app.scaling.pipe import Pipe
from app.scaling.redis_link import RedisDown

# Windows that one instance counts for itself while Redis is down; the oldest is forgotten first.
LOCAL_WINDOWS = 10_000

# Counts only what is allowed: a client that keeps knocking does not push its own window away.
_TAKE = """
local used = tonumber(redis.call('GET', KEYS[1]) or '0')
local left = redis.call('PTTL', KEYS[1])
if left < 0 then left = tonumber(ARGV[2]); used = 0 end
if used >= tonumber(ARGV[1]) then return {0, 0, left} end
if used == 0 then redis.call('SET', KEYS[1], 1, 'PX', left) else redis.call('INCR', KEYS[1]) end
return {1, tonumber(ARGV[1]) - used - 1, left}
"""
_GIVE_BACK = """
if tonumber(redis.call('GET', KEYS[1]) or '0') >= tonumber(ARGV[1]) then redis.call('DECRBY', KEYS[1], ARGV[1]) end
return 1
"""


@dataclass(frozen=True, slots=True)
class Policy:
    """A limit by name: `quota` requests in `window` seconds.

    Attributes:
        name: for clients, in headers, and for metrics.
        quota: how many.
        window: seconds.
        family: policies of one family share their counts: a caller whose tier changes goes on in the same window.
            Without one a policy counts for itself.
    """

    name: str
    quota: int
    window: int
    family: str = ""

    @classmethod
    def parse(cls, name: str, limit: str, family: str = "") -> "Policy":
        """Read the syntax that slowapi documents, `100/hour`."""
        item = limits.parse(limit)
        return cls(name, item.amount, item.get_expiry(), family)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a check found: whether this request fits, how many are left, and in how many seconds the window closes."""

    policy: Policy
    allowed: bool
    remaining: int
    reset: int

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return the fields of the IETF draft on rate limit headers, for answers of either kind."""
        name = self.policy.name
        return [
            (b"ratelimit-policy", f'"{name}";q={self.policy.quota};w={self.policy.window}'.encode()),
            (b"ratelimit", f'"{name}";r={self.remaining};t={self.reset}'.encode()),
        ]

    def error(self) -> RateLimited:
        """Return the error of a request that does not fit."""
        return RateLimited(
            f"More than {self.policy.quota} requests in {self.policy.window} s; try again in {self.reset} s.",
            retry_after=self.reset,
        )


class RateLimiter:
    """The limiter of one instance.

    Args:
        pipe: to the Redis that counts for all of them.
        instances: how many instances share a limit while Redis is down.
    """

    def __init__(self, pipe: Pipe, instances: int) -> None:
        self._pipe = pipe
        self._take = pipe.script(_TAKE)
        self._return = pipe.script(_GIVE_BACK)
        self._instances = instances
        self._local: OrderedDict[str, tuple[int, float]] = OrderedDict()

    async def take(self, policy: Policy, subject: str) -> Verdict:
        """Count one request of `subject` against `policy` and say whether it fits.

        Args:
            policy: the limit.
            subject: whose requests are counted: an address or a profile id.
        """
        name = name_of(policy, subject)
        try:
            allowed, remaining, left = await self._pipe.run(self._take, [name], [policy.quota, policy.window * 1000])
        except RedisDown:
            LIMITED_LOCALLY.inc()
            allowed, remaining, left = self._take_locally(name, policy)
        if not allowed:
            RATE_LIMITED.labels(policy.name).inc()
        return Verdict(policy, bool(allowed), int(remaining), max(1, -(-int(left) // 1000)))

    async def give_back(self, policy: Policy, subject: str, permits: int = 1) -> None:
        """Take back what was counted and not used."""
        name = name_of(policy, subject)
        try:
            await self._pipe.run(self._return, [name], [permits])
        except RedisDown:
            used, ends = self._local.get(name, (0, 0.0))
            self._local[name] = (max(0, used - permits), ends)

    def _take_locally(self, name: str, policy: Policy) -> tuple[bool, int, float]:
        now = time.monotonic()
        quota = max(1, policy.quota // self._instances)
        used, ends = self._local.get(name, (0, 0.0))
        if ends <= now:
            used, ends = 0, now + policy.window
        allowed = used < quota
        self._local[name] = (used + allowed, ends)
        self._local.move_to_end(name)
        if len(self._local) > LOCAL_WINDOWS:
            self._local.popitem(last=False)
        return allowed, quota - used - allowed, (ends - now) * 1000


def tiers_of(rates: RateSettings) -> dict[str, Policy]:
    """Return the limit of each tier of profiles; the first is that of a tier without one of its own."""
    return {name: Policy.parse(name, getattr(rates, name), "profile") for name in ("free", "pro", "enterprise")}


def name_of(policy: Policy, subject: str) -> str:
    """Return the name under which Redis counts the requests of `subject`."""
    return f"limit:{policy.family or policy.name}:{{{subject}}}"
