"""Rate limits over two instances: exact, in windows, and held by each instance for itself while Redis is away."""

import asyncio
from time import monotonic
from types import SimpleNamespace
from uuid import uuid4

import pytest
from conftest import until

from app.core.addresses import RedisAddress
from app.scaling import ratelimit
from app.scaling.pipe import Pipe
from app.scaling.ratelimit import Policy, RateLimiter, Verdict
from app.wiring import Resources

pytest_plugins = ("quiet",)

FREE = Policy("free", 30, 3600)


@pytest.fixture
def subject() -> str:
    """A caller that no other test has."""
    return uuid4().hex


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> RateLimiter:
    """The limiter of one of four instances whose Redis is not there."""
    monkeypatch.setattr(ratelimit, "LOCAL_WINDOWS", 10)
    return RateLimiter(Pipe(RedisAddress.parse("redis://127.0.0.1:1/0"), 1.0), instances=4)


@pytest.mark.sabotage(
    path="app/scaling/ratelimit.py", take_out="if used >= tonumber(ARGV[1])", put="if used > tonumber(ARGV[1])"
)
async def test_two_instances_together_allow_exactly_the_limit(quiet: Resources, other: Resources, subject: str) -> None:
    limiters = [quiet.limiter, other.limiter] * 50
    verdicts = await asyncio.gather(*(limiter.take(FREE, subject) for limiter in limiters))
    allowed = [verdict for verdict in verdicts if verdict.allowed]
    assert sorted(verdict.remaining for verdict in allowed) == list(range(30))
    assert {verdict.remaining for verdict in verdicts if not verdict.allowed} == {0}
    assert all(3590 <= verdict.reset <= 3600 for verdict in verdicts)


async def test_callers_and_policies_have_windows_of_their_own(quiet: Resources, subject: str) -> None:
    once = Policy("once", 1, 3600)
    assert (await quiet.limiter.take(once, subject)).allowed
    assert not (await quiet.limiter.take(once, subject)).allowed
    assert (await quiet.limiter.take(once, f"{subject}-other")).allowed
    assert (await quiet.limiter.take(Policy("twice", 1, 3600), subject)).allowed


async def test_a_window_closes_after_its_period_however_often_the_caller_knocks(quiet: Resources, subject: str) -> None:
    policy = Policy("short", 2, 60)
    for _ in range(2):
        assert (await quiet.limiter.take(policy, subject)).allowed

    async def allowed_again() -> bool:
        return (await quiet.limiter.take(policy, subject)).allowed

    assert not await allowed_again()
    name = ratelimit.name_of(policy, subject)
    await quiet.pipe.ask(name, "PEXPIRE", name, 200)  # as if all but the end of it had passed
    await until(allowed_again)
    assert await allowed_again()
    assert not await allowed_again()


@pytest.mark.sabotage(
    path="app/scaling/ratelimit.py",
    take_out="            allowed, remaining, left = self._take_locally(name, policy)",
    put="            allowed, remaining, left = True, 1, 1000",
)
async def test_without_redis_each_instance_allows_its_share(alone: RateLimiter, subject: str) -> None:
    policy = Policy("free", 40, 3600)
    verdicts = [await alone.take(policy, subject) for _ in range(25)]
    assert [verdict.allowed for verdict in verdicts] == [True] * 10 + [False] * 15
    assert [verdict.remaining for verdict in verdicts[:10]] == list(range(9, -1, -1))
    assert (await alone.take(Policy("tiny", 1, 3600), subject)).allowed


@pytest.mark.sabotage(path="app/scaling/ratelimit.py", take_out="if len(self._local) > LOCAL_WINDOWS:", put="if False:")
async def test_what_an_instance_counts_for_itself_is_bounded(alone: RateLimiter) -> None:
    for number in range(50):
        await alone.take(FREE, f"address-{number}")
    assert len(alone._local) == 10


async def test_a_local_window_closes_after_its_period(
    alone: RateLimiter, subject: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Policy("short", 4, 60)
    assert (await alone.take(policy, subject)).allowed
    assert not (await alone.take(policy, subject)).allowed
    monkeypatch.setattr(ratelimit, "time", SimpleNamespace(monotonic=lambda: monotonic() + policy.window))
    assert (await alone.take(policy, subject)).allowed
    assert not (await alone.take(policy, subject)).allowed


def test_the_headers_are_those_of_the_draft_and_the_error_says_when() -> None:
    verdict = Verdict(FREE, allowed=False, remaining=0, reset=17)
    assert verdict.headers() == [
        (b"ratelimit-policy", b'"free";q=30;w=3600'),
        (b"ratelimit", b'"free";r=0;t=17'),
    ]
    assert (verdict.error().retry_after, verdict.error().code) == (17, "rate_limited")


@pytest.mark.parametrize(
    ("limit", "quota", "window"),
    [("100/hour", 100, 3600), ("10/minute", 10, 60), ("5/second", 5, 1), ("9/day", 9, 86400)],
)
def test_a_limit_is_read_as_it_is_set(limit: str, quota: int, window: int) -> None:
    assert Policy.parse("free", limit) == Policy("free", quota, window)
