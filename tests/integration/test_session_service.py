"""Sessions on two instances: Redis may lose them, ended is ended everywhere, and what I wrote I see everywhere."""

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import orjson
import pytest
from quiet import REPLICAS, Servers, stranger

from app.core import context
from app.core.errors import Conflict, Unauthenticated, Unavailable
from app.core.ids import new_id
from app.domain.profiles.directory import ABANDONED_AFTER
from app.domain.profiles.rules import NewProfile, Profile, email_key
from app.domain.sessions.rules import Session, SignedIn, name_of, new_token
from app.domain.sessions.service import SEEN_EVERY, Sessions
from app.wiring import Resources

pytest_plugins = ("quiet",)

PASSWORD = "a long enough pass phrase"


@pytest.fixture
def email() -> str:
    """An address that nobody has."""
    return f"{uuid4().hex}@example.com"


@pytest.fixture
async def profile(quiet: Resources, email: str) -> Profile:
    """A signed-up customer."""
    return await quiet.profiles.sign_up(NewProfile(email, PASSWORD, "Ada Lovelace"))


@pytest.fixture
async def signed_in(quiet: Resources, profile: Profile) -> SignedIn:
    """The customer's session."""
    return await quiet.sessions.sign_in(profile.email, PASSWORD, "a browser")


async def found(instance: Resources, token: str) -> Session | None:
    """Look a token up as a request does that knows nothing yet."""
    with context.working(stranger()):
        return await instance.sessions.find(token)


async def test_a_session_is_known_on_every_instance(other: Resources, profile: Profile, signed_in: SignedIn) -> None:
    session = await found(other, signed_in.token)
    assert session == signed_in.session
    assert (session.profile_id, session.tier, session.role) == (profile.id, "free", "member")
    assert session.expires_at - session.created_at == timedelta(days=30)


@pytest.mark.sabotage("app/domain/sessions/service.py", ", profiles.c.erased_at.is_(None)\n", "\n")
async def test_nobody_is_signed_in_who_is_erased_meanwhile(
    quiet: Resources, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify = quiet.profiles.verify

    async def erase_after(email: str, password: str) -> Profile | None:
        verified = await verify(email, password)
        await quiet.profiles.erase(profile.id, profile.version)
        await quiet.sessions.end_all(profile.id)
        return verified

    monkeypatch.setattr(quiet.profiles, "verify", erase_after)
    with pytest.raises(Unauthenticated) as refusal:
        await quiet.sessions.sign_in(profile.email, PASSWORD, "a browser")
    assert refusal.value.code == "invalid_credentials"


@pytest.mark.sabotage(
    path="app/domain/sessions/service.py",
    take_out="                looking = asyncio.create_task(self._recover(profile_id, key))",
    put="                return None",
)
async def test_losing_redis_signs_nobody_out(quiet: Resources, other: Resources, signed_in: SignedIn) -> None:
    await quiet.redis.client.flushdb()
    with context.working(context.Work("req-12345678", positions=dict(context.current().positions))):
        assert await other.sessions.find(signed_in.token) == signed_in.session
    assert await quiet.redis.client.keys("session:*")


@pytest.mark.sabotage(
    path="app/domain/sessions/service.py",
    take_out="self._database.reader(profile_id, newest=True).first(copy)",
    put="self._database.reader(profile_id).first(copy)",
)
async def test_a_session_that_no_replica_has_yet_outlives_redis(
    quiet: Resources, other: Resources, servers: Servers, profile: Profile
) -> None:
    async with servers.paused(*REPLICAS):
        signed_in = await quiet.sessions.sign_in(profile.email, PASSWORD, "a browser")
        await quiet.redis.client.flushdb()
        assert await found(other, signed_in.token) == signed_in.session


async def test_while_redis_is_down_sessions_are_known_and_ending_one_is_kept_as_a_message(
    quiet: Resources, servers: Servers, signed_in: SignedIn
) -> None:
    async with servers.down("redis"):
        assert await quiet.sessions.find(signed_in.token) == signed_in.session
        await quiet.sessions.end(signed_in.session)
        assert await quiet.sessions.find(signed_in.token) is None
        (message,) = await servers.sql(
            "primary",
            "SELECT payload FROM outbox WHERE event = 'session.ended' AND profile_id = $1",
            signed_in.session.profile_id,
        )
        (key,) = orjson.loads(message["payload"])["keys"]
        assert key == signed_in.session.key
    # Redis kept its copy over the restart; the message's task takes it out.
    await quiet.sessions.forget(signed_in.session.profile_id, [key])
    assert await quiet.sessions.find(signed_in.token) is None


@pytest.mark.sabotage(
    path="app/domain/sessions/service.py",
    take_out="            await self._strike(writer, profile.id, [row.key for row in idle])\n",
    put="",
)
async def test_past_its_most_sessions_a_profile_loses_the_one_that_was_not_used_for_longest(
    quiet: Resources, other: Resources, profile: Profile
) -> None:
    few = quiet.settings.sessions.model_copy(update={"most": 3})
    sessions = Sessions(quiet.database, quiet.pipe, quiet.near, quiet.positions, known=quiet.profiles, settings=few)
    signed_in = [await sessions.sign_in(profile.email, PASSWORD, f"device {number}") for number in range(5)]
    listed = {view["key"]: view["id"] for view in await quiet.sessions.listed(profile.id)}
    assert set(listed) == {each.session.key for each in signed_in[2:]}
    assert [len(each.ended) for each in signed_in] == [0, 0, 0, 1, 1]
    for number, each in enumerate(signed_in):
        assert (await found(other, each.token) is None) == (number < 2)


@pytest.mark.parametrize("everywhere", [True, False])
async def test_an_ended_session_is_unknown_everywhere_at_once(
    quiet: Resources, other: Resources, profile: Profile, signed_in: SignedIn, *, everywhere: bool
) -> None:
    second = await quiet.sessions.sign_in(profile.email, PASSWORD, "a phone")
    if everywhere:
        await quiet.sessions.end_all(profile.id)
    else:
        await quiet.sessions.end(signed_in.session)
    for instance in (quiet, other):
        assert await found(instance, signed_in.token) is None
        assert (await found(instance, second.token) is None) == everywhere


@pytest.mark.sabotage(
    path="app/scaling/database/__init__.py",
    take_out="await self._positions.settle(mark, opened.position if opened else 0)",
    put="await self._positions.settle(mark, 0)",
)
async def test_an_ended_session_is_not_taken_back_from_a_replica_that_is_behind(
    quiet: Resources, other: Resources, servers: Servers, signed_in: SignedIn
) -> None:
    async with servers.paused(*REPLICAS):
        await quiet.sessions.end(signed_in.session)
        assert await found(other, signed_in.token) is None


@pytest.mark.sabotage(
    path="app/domain/sessions/service.py",
    take_out="        self._positions.heed(known)\n        return answer",
    put="        return answer",
)
async def test_a_stream_hears_of_the_end_of_its_session_while_replicas_are_behind(
    quiet: Resources, other: Resources, servers: Servers, signed_in: SignedIn
) -> None:
    session = signed_in.session
    async with servers.paused(*REPLICAS):
        await quiet.sessions.end(session)
        with context.working(stranger()):
            assert not await other.sessions.lives(session)
        assert not await quiet.redis.client.exists(name_of(session.profile_id, session.key))
    assert await found(other, signed_in.token) is None


@pytest.mark.sabotage(
    path="app/domain/sessions/service.py",
    take_out="        if not known:\n",
    put="        if False:\n",
)
async def test_a_session_that_ended_while_it_was_renewed_does_not_come_back(
    quiet: Resources, servers: Servers, profile: Profile, signed_in: SignedIn
) -> None:
    await _age(quiet, signed_in.session, SEEN_EVERY * 2)
    await servers.sql("primary", "DELETE FROM sessions WHERE sessions.key = $1", signed_in.session.key)
    assert await found(quiet, signed_in.token) is None
    assert not await quiet.redis.client.exists(name_of(profile.id, signed_in.session.key))


@pytest.mark.sabotage(
    path="app/domain/sessions/admission.py",
    take_out=" and redis.call('SET', KEYS[4], 1, 'NX', 'EX', TOLD) then",
    put=" then",
)
async def test_of_many_requests_at_once_one_tells_the_copy_that_the_session_is_in_use(
    quiet: Resources, signed_in: SignedIn
) -> None:
    await _age(quiet, signed_in.session, SEEN_EVERY * 2)
    admitted = await asyncio.gather(*(quiet.admissions.admit(signed_in.token) for _ in range(5)))
    assert admitted.count(None) == 1
    told = await found(quiet, signed_in.token)
    assert told is not None
    assert datetime.now(UTC) - told.seen_at < SEEN_EVERY
    assert await quiet.admissions.admit(signed_in.token)


async def test_use_is_told_to_the_copy_and_renews_the_idle_time(
    quiet: Resources, servers: Servers, signed_in: SignedIn
) -> None:
    session = signed_in.session
    name = f"session:{{{session.profile_id}}}:{session.key}"
    await _age(quiet, session, SEEN_EVERY * 2)
    await quiet.redis.client.expire(name, 10)
    seen = await found(quiet, signed_in.token)
    assert seen is not None
    assert datetime.now(UTC) - seen.seen_at < SEEN_EVERY
    (row,) = await servers.sql("primary", "SELECT seen_at FROM sessions WHERE sessions.key = $1", session.key)
    assert row["seen_at"] == seen.seen_at
    assert await quiet.redis.client.ttl(name) > quiet.settings.sessions.idle - 10


@pytest.mark.sabotage(
    "app/domain/sessions/service.py",
    "- SEEN_EVERY,\n                profiles.c",
    "- timedelta(days=1),\n                profiles.c",
)
@pytest.mark.parametrize("column", ["expires_at", "seen_at"])
async def test_an_expired_or_idle_session_is_not_recovered(
    quiet: Resources, servers: Servers, signed_in: SignedIn, column: str
) -> None:
    statement = f"UPDATE sessions SET {column} = now() - interval '2' hour WHERE sessions.key = $1"  # noqa: S608  # our own name
    await servers.sql("primary", statement, signed_in.session.key)
    await quiet.redis.client.flushdb()
    context.current().reached(0, context.unknown_position(60))
    assert await quiet.sessions.find(signed_in.token) is None


@pytest.mark.parametrize("token", ["", "sct_", "nonsense", new_token(new_id())[0]])
async def test_a_token_that_is_not_ours_is_nobody(quiet: Resources, token: str) -> None:
    assert await quiet.sessions.find(token) is None


async def test_a_wrong_password_and_an_unknown_address_are_refused_alike(quiet: Resources, profile: Profile) -> None:
    said = []
    for address, password in ((profile.email, "wrong"), ("nobody@example.com", PASSWORD)):
        with pytest.raises(Unauthenticated) as refusal:
            await quiet.sessions.sign_in(address, password, "")
        said.append((refusal.value.code, refusal.value.detail))
    assert said[0] == said[1]
    assert said[0][0] == "invalid_credentials"


@pytest.mark.sabotage(
    path="app/scaling/positions.py",
    take_out="                work.reached(int(shard), int(value))",
    put="                work.reached(int(shard), 0)",
)
async def test_what_i_wrote_on_one_instance_i_see_on_another_whatever_its_replicas_know(
    quiet: Resources, other: Resources, servers: Servers, profile: Profile, signed_in: SignedIn
) -> None:
    async with servers.paused(*REPLICAS):
        changed = await quiet.profiles.change(profile.id, 1, {"name": "Ada King"})
        with context.working(stranger()):
            assert await other.sessions.find(signed_in.token) is not None
            assert await other.profiles.own(profile.id) == changed


async def test_sessions_are_listed_newest_first_without_what_opens_them(
    quiet: Resources, profile: Profile, signed_in: SignedIn
) -> None:
    await quiet.sessions.sign_in(profile.email, PASSWORD, "x" * 500)
    listed = await quiet.sessions.listed(profile.id)
    assert [view["user_agent"] for view in listed] == ["x" * 200, "a browser"]
    assert signed_in.token not in str(listed)


async def test_of_two_sign_ups_with_one_address_one_wins_and_leaves_nothing_of_the_other(
    quiet: Resources, other: Resources, servers: Servers, email: str
) -> None:
    outcomes = await asyncio.gather(
        *(
            instance.profiles.sign_up(NewProfile(address, PASSWORD, "Twin"))
            for instance in (quiet, other)
            for address in (email, email.upper())
        ),
        return_exceptions=True,
    )
    (winner,) = [outcome for outcome in outcomes if isinstance(outcome, Profile)]
    assert [outcome.code for outcome in outcomes if isinstance(outcome, Conflict)] == ["email_taken"] * 3
    (row,) = await servers.sql("primary", "SELECT profile_id FROM profiles WHERE email = $1", email)
    assert row["profile_id"] == winner.id == await quiet.directory.find(email.upper())


@pytest.mark.sabotage(
    path="app/domain/profiles/directory.py", take_out="            if exists:\n", put="            if True:\n"
)
@pytest.mark.sabotage(
    "app/domain/profiles/service.py", "        await self._directory.doubt(known.email, profile_id)\n", ""
)
async def test_an_erasure_that_was_cut_off_does_not_keep_the_address_taken(
    quiet: Resources, servers: Servers, email: str, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def cut_off(_email: str, _profile_id: UUID) -> None:
        raise Unavailable("the process is gone")

    monkeypatch.setattr(quiet.directory, "release", cut_off)
    with pytest.raises(Unavailable):
        await quiet.profiles.erase(profile.id, profile.version)
    await servers.sql(
        "primary",
        "UPDATE email_directory SET reserved_at = $1 WHERE profile_id = $2",
        datetime.now(UTC) - 2 * ABANDONED_AFTER,
        profile.id,
    )
    await quiet.directory.sweep()
    assert await quiet.directory.find(email) is None


async def test_the_sweep_confirms_the_address_of_a_profile_and_frees_that_of_none(
    quiet: Resources, servers: Servers, email: str, profile: Profile
) -> None:
    unborn = f"unborn-{email}"
    await quiet.directory.reserve(unborn, new_id())
    await quiet.directory.reserve(f"young-{email}", new_id())
    await servers.sql(
        "primary",
        "UPDATE email_directory SET confirmed = 0, reserved_at = $1 WHERE email_key <> $2",
        datetime.now(UTC) - 2 * ABANDONED_AFTER,
        _directory_key(quiet, f"young-{email}"),
    )
    context.current().reached(0, context.unknown_position(60))
    assert await quiet.directory.sweep() >= 2
    assert await quiet.directory.find(email) == profile.id
    assert await quiet.directory.find(unborn) is None
    assert await quiet.directory.find(f"young-{email}") is not None
    assert await quiet.directory.sweep() == 0


def _directory_key(instance: Resources, email: str) -> str:
    return email_key(instance.settings.service.secret, email)


async def _age(instance: Resources, session: Session, by: timedelta) -> None:
    """Let Redis believe that the copy learnt of the session's use that long ago."""
    await instance.sessions._keep(replace(session, seen_at=session.seen_at - by))
