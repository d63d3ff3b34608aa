"""Who calls and whether they may, for nearly every request: one round trip to Redis, or none.

One script finds the session, counts the request against the limit of its tier, and brings along the positions or the
cached value that the request is about. Of a caller who comes often an instance takes several permits at a time and
keeps the session for a second, so most requests ask nobody. All permits are counted in Redis when they are taken, and
those that are not used go back: together the instances never allow more than the limit.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from time import monotonic, time
from typing import NamedTuple
from uuid import UUID

from app.core.settings import Settings
from app.core.telemetry import RATE_LIMITED
from app.domain.sessions.rules import Session, load, name_of, read_token
from app.scaling import positions
from app.scaling.near import Near
from app.scaling.pipe import Pipe
from app.scaling.ratelimit import Policy, RateLimiter, Verdict, tiers_of
from app.scaling.redis_link import RedisDown
from app.scaling.values import LEASE_MILLISECONDS

# An ended session is refused everywhere within a second, also by an instance that no push reaches.
KEPT_SECONDS = 1.0
# Permits at a time: so many that one request in 64 asks Redis, so few that the headers stay near the truth.
MOST_PERMITS = 64
# Leases that are not used any more go back after at least this time, well within the shortest useful window.
IDLE_SECONDS = 1.0
# Callers with permits at hand; more than an instance serves in a second.
MOST_LEASES = 10_000
# The copy on the shard learns of use at most this often: idle time is then known to 5 minutes if Redis is lost.
SEEN_EVERY = timedelta(minutes=5)
# One request of a session at a time is sent to tell it; the next one after this time, if that one could not.
TOLD_WITHIN = 10  # seconds
# Sessions that an instance remembers to have been real; more than it serves in an hour, about 2 MB.
MOST_VOUCHED = 10_000

# KEYS: session, positions, count of the limit, whether somebody tells the copy, and where a value is asked for, the
# value and the lease of who loads it.
# ARGV: idle seconds, how fresh `seen` must be, now, wanted permits, whether a value that is there needs the positions.
# TIERS: quota and window (ms) by tier; `*` is that of a tier without one of its own.
# Who has a permit wants none. Else a sixteenth of what is left at most, so that a caller near the limit is counted one
# by one. The idle time is renewed once a sixtieth of it has passed: renewing is a write, and few requests need one. A
# value that is not there is claimed for a caller who is let in. With positions the lease has another name, which only
# they say: it is known here where there is one, as after a write of the last minutes, but not with a write under way.
_ADMIT = """
local raw = redis.call('GET', KEYS[1])
if not raw then return 0 end
local session = cjson.decode(raw)
if session[5] <= ARGV[3] then return 0 end
if session[4] < ARGV[2] and redis.call('SET', KEYS[4], 1, 'NX', 'EX', TOLD) then return 0 end
local idle = tonumber(ARGV[1])
if redis.call('TTL', KEYS[1]) * 60 < idle * 59 then redis.call('EXPIRE', KEYS[1], idle) end
local tiers = TIERS
local tier = tiers[session[1]] or tiers['*']
local quota, left = tier[1], redis.call('PTTL', KEYS[3])
local used = 0
if left < 0 then left = tier[2] else used = tonumber(redis.call('GET', KEYS[3])) end
local value = KEYS[5] and redis.call('GET', KEYS[5])
local positions = {}
if not value or ARGV[5] == '1' then positions = redis.call('HGETALL', KEYS[2]) end
local permits, wanted = 0, tonumber(ARGV[4])
if wanted > 0 and used < quota then
  permits = math.max(1, math.min(wanted, math.floor((quota - used) / 16)))
  if used == 0 then redis.call('SET', KEYS[3], permits, 'PX', left) else redis.call('INCRBY', KEYS[3], permits) end
end
local settled = #positions == 2 and not string.find(positions[1], ':', 1, true)
if KEYS[5] and not value and (#positions == 0 or settled) and (permits > 0 or wanted == 0) then
  local lease = settled and KEYS[6] .. positions[1] .. ':' .. positions[2] or KEYS[6]
  value = redis.call('SET', lease, 1, 'NX', 'PX', LEASE) and 1 or 0
end
return {raw, permits, math.max(0, quota - used - permits), left, value or false, positions}
"""


class Admission(NamedTuple):
    """A caller whose request has been counted.

    Attributes:
        session: theirs.
        verdict: of their limit.
        value: what Redis held under the name that was asked for along with it; where it held nothing, whether it is now
            the caller's to load, or None where that has to be asked still.
        positions: what their reads must have reached, as `Positions.heed` takes it; with a value only for its owner.
    """

    session: Session
    verdict: Verdict
    value: bytes | bool | None
    positions: Sequence[bytes]


@dataclass(slots=True)
class _Lease:
    """Permits of one caller that are counted already: how many, until when, and what was left besides."""

    policy: Policy
    permits: int
    remaining: int
    ends: float
    taken_at: float
    wanted: int

    def use(self, now: float) -> Verdict | None:
        """Use one permit; None if there is none in this window."""
        if self.permits < 1 or now >= self.ends:
            return None
        self.permits -= 1
        return Verdict(self.policy, allowed=True, remaining=self.remaining + self.permits, reset=_ceil(self.ends - now))


class Admissions:
    """The admissions of one process; `start` gives back unused permits until `stop`.

    Args:
        pipe: to the Redis that holds sessions and limits.
        values: to the Redis that holds cached values; the same one, or another.
        near: keeps sessions.
        limiter: takes permits back.
        settings: how long a session lives without use, and the limit of each tier.
    """

    def __init__(self, pipe: Pipe, values: Pipe, near: Near, limiter: RateLimiter, settings: Settings) -> None:
        self._pipe = pipe
        self._values = values
        # One script may name any keys of one server. On a cluster, or on two servers, the value is asked for beside it.
        self._together = values is pipe and pipe.one_server
        self._near = near
        self._limiter = limiter
        self._idle = settings.sessions.idle
        self._tiers = tiers_of(settings.rates)
        self._default = next(iter(self._tiers.values()))
        limits = {"*": self._default, **self._tiers}
        written = ", ".join(f"['{name}'] = {{{each.quota}, {each.window * 1000}}}" for name, each in limits.items())
        script = _ADMIT.replace("TIERS", f"{{{written}}}").replace("LEASE", str(LEASE_MILLISECONDS))
        script = script.replace("TOLD", str(TOLD_WITHIN))
        self._script = pipe.script(script)
        self._leases: OrderedDict[str, _Lease] = OrderedDict()
        self._vouched: OrderedDict[str, None] = OrderedDict()
        self._sweeping: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to give back what is not used."""
        self._sweeping = asyncio.create_task(self._sweep())

    async def stop(self) -> None:
        """Give everything back."""
        if self._sweeping is not None:
            self._sweeping.cancel()
            await asyncio.wait({self._sweeping})
        await self._return([(name, self._leases[name]) for name in list(self._leases)])

    def at_hand(self, token: str) -> Admission | None:
        """Return the admission of a caller whose session and permits are here, without asking anybody; else None."""
        names = _names_of(token)
        if names is None:
            return None
        session: Session | None = self._near.get(names.session)
        lease = self._leases.get(names.subject)
        if session is None or lease is None:
            return None
        verdict = lease.use(monotonic())
        return None if verdict is None else Admission(session, verdict, None, ())

    def known(self, token: str) -> str | None:
        """Return under which name the caller is counted if the session is here, asking nobody; None says nothing."""
        names = _names_of(token)
        return names.subject if names is not None and self._near.get(names.session) is not None else None

    def vouches_for(self, token: str) -> bool:
        """Return whether this token was a session's when it was seen here last, so that nobody has made it up."""
        names = _names_of(token)
        return names is not None and names.session in self._vouched

    def vouch(self, token: str) -> None:
        """Remember that this token is a session's."""
        names = _names_of(token)
        if names is not None:
            self._vouched[names.session] = None
            self._vouched.move_to_end(names.session)
            if len(self._vouched) > MOST_VOUCHED:
                self._vouched.popitem(last=False)

    def doubt(self, token: str) -> None:
        """Forget that this token was a session's."""
        names = _names_of(token)
        if names is not None:
            self._vouched.pop(names.session, None)

    def is_of(self, token: str, profile: str) -> bool:
        """Return whether a token says that it is of the profile with this id."""
        names = _names_of(token)
        return names is not None and names.subject == profile

    async def admit(self, token: str, value: tuple[str, str] | None = None, *, own: bool = False) -> Admission | None:
        """Return the admission of the caller, in one round trip; in two where values are elsewhere.

        Args:
            token: theirs.
            value: the names of a cached value to bring along and of its lease.
            own: whether the value is of their profile, and only tells something together with their positions.

        Returns:
            None, with nothing counted, if Redis does not know the session or is down, or this request has to tell the
            session's copy that it is in use: then `Sessions.find` knows.
        """
        names = _names_of(token)
        if names is None:
            return None
        subject = names.subject
        asked_at, moment, epoch = monotonic(), time(), self._near.epoch
        fresh, now = _moments(int(moment))
        lease = self._leases.get(subject)
        # A permit at hand is used up first: callers whose requests always ask would else heap up what nobody uses.
        used = None if lease is None else lease.use(asked_at)
        wanted = self._wanted(lease, asked_at) if used is None else 0
        keys = [names.session, names.positions, names.limit, names.told]
        if value is not None and self._together:
            keys += value
        answer, aside = None, None
        with suppress(RedisDown):
            if value is not None and not self._together and not own:
                aside = self._values.ask(value[0], "GET", value[0])
            answer = await self._pipe.run(self._script, keys, (self._idle, fresh, now, wanted, int(own)))
        if not answer:
            if lease is not None and used is not None:
                lease.permits += 1
            return None
        raw, permits, remaining, left, found, reached = answer
        held = bool(found) if isinstance(found, int) else found
        if value is not None and not self._together:
            with suppress(RedisDown):  # then it is not there
                # One's own after the positions: from before, it may be older than what they say is done.
                held = await (aside or self._values.ask(value[0], "GET", value[0]))
        session = load(names.profile_id, names.key, raw)
        self.vouch(token)
        self._near.keep(names.session, session, epoch, min(KEPT_SECONDS, session.expires_at.timestamp() - moment))
        if lease is not None and used is not None:
            lease.remaining = remaining
            return Admission(session, used, held, reached)
        policy = self._tiers.get(session.tier, self._default)
        if not permits:
            RATE_LIMITED.labels(policy.name).inc()
            return Admission(session, Verdict(policy, allowed=False, remaining=0, reset=_ceil(left / 1000)), None, ())
        # Counted from before the question: the window here never ends after the one in Redis.
        ends = asked_at + left / 1000
        added = self._leases.get(subject)  # others of the same caller may have taken some meanwhile
        kept = added.permits if added is not None and added.ends > asked_at and added.policy == policy else 0
        self._leases[subject] = _Lease(policy, permits + kept - 1, remaining, ends, asked_at, wanted)
        self._leases.move_to_end(subject)
        if len(self._leases) > MOST_LEASES:
            self._leases.popitem(last=False)
        verdict = Verdict(policy, allowed=True, remaining=remaining + permits + kept - 1, reset=_ceil(left / 1000))
        return Admission(session, verdict, held, reached)

    def _wanted(self, lease: _Lease | None, now: float) -> int:
        if lease is None or not self._near.trusted():
            return 1
        return min(MOST_PERMITS, lease.wanted * 2) if now - lease.taken_at < IDLE_SECONDS else lease.wanted

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(IDLE_SECONDS)
            now = monotonic()
            idle = [(name, lease) for name, lease in self._leases.items() if now - lease.taken_at > IDLE_SECONDS]
            await self._return(idle)

    async def _return(self, leases: list[tuple[str, _Lease]]) -> None:
        now = monotonic()
        for name, lease in leases:
            self._leases.pop(name, None)
            # In the last second the window in Redis may be a new one, of which nothing was taken.
            if lease.permits < 1 or lease.ends - now < 1:
                continue
            await self._limiter.give_back(lease.policy, name, lease.permits)


def _ceil(seconds: float) -> int:
    return max(1, -int(-seconds // 1))


class _Names(NamedTuple):
    """What follows from a token: whose it is, and the names of all that Redis knows of them."""

    profile_id: UUID
    key: str
    subject: str
    session: str
    positions: str
    limit: str
    told: str


# Of the callers of the last moments; hashing a token and writing six names costs more than the rest of an admission.
@lru_cache(maxsize=4096)
def _names_of(token: str) -> _Names | None:
    parts = read_token(token)
    if parts is None:
        return None
    profile_id, key = parts
    subject = str(profile_id)
    limit = f"limit:profile:{{{subject}}}"
    told = f"told:{{{subject}}}:{key}"
    return _Names(profile_id, key, subject, name_of(profile_id, key), positions.name_of(profile_id), limit, told)


@lru_cache(maxsize=2)
def _moments(second: int) -> tuple[str, str]:
    """Return how fresh `seen` must be and the present, to the second, as the script compares them with `dump`'s."""
    now = datetime.fromtimestamp(second, UTC).replace(tzinfo=None)
    return f"{(now - SEEN_EVERY).isoformat()}Z", f"{now.isoformat()}Z"
