"""Profiles on real servers: search, pages while rows come in, versions, and erasure that leaves nothing personal."""

import asyncio
from typing import Any
from uuid import uuid4

import orjson
import pytest
from engines import WORDS
from quiet import REPLICAS, Servers, stranger

from app.core import context
from app.core.errors import Invalid, NotFound, PreconditionFailed
from app.core.ids import new_id
from app.domain.profiles.rules import Location, NewProfile, Profile
from app.wiring import Resources

pytest_plugins = ("quiet",)

PASSWORD = "a long enough pass phrase"


async def sign_up(instance: Resources, name: str, **more: Any) -> Profile:
    return await instance.profiles.sign_up(NewProfile(f"{uuid4().hex}@example.com", PASSWORD, name, **more))


async def page(instance: Resources, *, prefix: str | None = None, attribute: Any = None, limit: int = 100) -> list[str]:
    """Return the names on the first page."""
    return [
        item["name"]
        for item in orjson.loads(await instance.cache.page(instance.profiles.listed(prefix, attribute, limit, None)))[
            "items"
        ]
    ]


@pytest.mark.sabotage(
    path="app/scaling/dialect/statements.py", take_out='.replace("%", r"\\%").replace("_", r"\\_")', put=""
)
async def test_a_prefix_means_its_characters_whatever_they_are_to_like(quiet: Resources) -> None:
    mark = uuid4().hex
    names = [f"{mark}{rest}" for rest in ("100% Ada", "100x Ada", "a_b", "axb", "back\\slash", "backslash", "Zoë")]
    for name in names:
        await sign_up(quiet, name)
    for rest, expected in (
        ("100%", ["100% Ada"]), ("a_", ["a_b"]), ("back\\", ["back\\slash"]), ("ZO", ["Zoë"]), ("zoË", ["Zoë"]),
        ("%", []), ("_", []), ("\\", []), ("", ["Zoë", "backslash", "back\\slash", "axb", "a_b", "100x Ada", "100% Ada"]),  # noqa: E501
    ):  # fmt: skip
        assert await page(quiet, prefix=mark + rest) == [mark + name for name in expected], rest


async def test_an_attribute_matches_by_its_text_number_or_truth(quiet: Resources) -> None:
    mark = uuid4().hex
    for name, value in (
        ("text", "7"),
        ("number", 7),
        ("true", True),
        ("word", "true"),
        ("list", ["7"]),
        ("none", None),
    ):
        await sign_up(quiet, name, attributes={mark: value, "other": 1})
    assert set(await page(quiet, attribute=(mark, "7"))) == {"text", "number"}
    assert set(await page(quiet, attribute=(mark, "true"))) == {"true", "word"}
    assert await page(quiet, attribute=(mark, "8")) == []
    assert await page(quiet, attribute=("other" + mark, "1")) == []


@pytest.mark.sabotage(
    path="app/domain/profiles/service.py",
    take_out="            filters.append(profiles.c.profile_id < after)",
    put="            filters.append(profiles.c.profile_id <= after)",
)
async def test_pages_show_each_profile_once_in_order_while_others_sign_up(quiet: Resources) -> None:
    mark = uuid4().hex
    there = [await sign_up(quiet, f"{mark} {number}") for number in range(7)]
    shown: list[str] = []
    cursor = None
    for _ in range(10):
        answer = orjson.loads(await quiet.cache.page(quiet.profiles.listed(mark, None, 2, cursor)))
        shown += [item["id"] for item in answer["items"]]
        await sign_up(quiet, f"{mark} late")
        cursor = answer["next_cursor"]
        if cursor is None:
            break
    assert shown == [str(profile.id) for profile in reversed(there)]


async def test_a_cursor_belongs_to_its_filters(quiet: Resources) -> None:
    mark = uuid4().hex
    for _ in range(2):
        await sign_up(quiet, mark)
    cursor = orjson.loads(await quiet.cache.page(quiet.profiles.listed(mark, None, 1, None)))["next_cursor"]
    with pytest.raises(Invalid):
        await quiet.cache.page(quiet.profiles.listed("another", None, 1, cursor))
    with pytest.raises(Invalid):
        await quiet.cache.page(quiet.catalog.listed(1, cursor))


async def test_a_list_shows_what_was_just_written_also_to_others_and_from_replicas_that_are_behind(
    quiet: Resources, other: Resources, servers: Servers
) -> None:
    mark = uuid4().hex
    await sign_up(quiet, f"{mark} first")
    assert await page(other, prefix=mark) == [f"{mark} first"]
    async with servers.paused(*REPLICAS):
        await sign_up(quiet, f"{mark} second")
        with context.working(stranger()):
            assert await page(other, prefix=mark) == [f"{mark} second", f"{mark} first"]


@pytest.mark.sabotage(
    path="app/domain/profiles/service.py",
    take_out="            self._cache.put(PROFILE, str(profile_id), entry),\n",
    put="",
)
async def test_a_change_is_seen_at_once_on_every_instance_and_raises_the_version(
    quiet: Resources, other: Resources
) -> None:
    profile = await sign_up(quiet, "Before", location=Location(48.2, 16.4))
    assert orjson.loads((await other.profiles.public(profile.id)).body or b"")["name"] == "Before"
    changed = await quiet.profiles.change(profile.id, 1, {"name": "After", "location": None})
    assert (changed.version, changed.name, changed.location) == (2, "After", None)
    with context.working(stranger()):
        entry = await other.profiles.public(profile.id)
    assert (entry.version, orjson.loads(entry.body or b"")["name"]) == (2, "After")


@pytest.mark.sabotage(
    path="app/domain/profiles/service.py", take_out="            if not changed:\n", put="            if False:\n"
)
async def test_of_many_changes_to_one_version_one_is_made(quiet: Resources) -> None:
    profile = await sign_up(quiet, "Before")
    outcomes = await asyncio.gather(
        *(quiet.profiles.change(profile.id, 1, {"name": f"After {number}"}) for number in range(5)),
        return_exceptions=True,
    )
    (made,) = [outcome for outcome in outcomes if isinstance(outcome, Profile)]
    assert sum(isinstance(outcome, PreconditionFailed) for outcome in outcomes) == 4
    assert await quiet.profiles.own(profile.id) == made


@pytest.mark.sabotage(
    "app/domain/profiles/rules.py",
    '        return {\n            "id": self.id,',
    '        return {\n            "email": getattr(self, "email", None),\n            "id": self.id,',
)
async def test_the_public_view_keeps_what_is_private(quiet: Resources) -> None:
    profile = await sign_up(quiet, "Ada", location=Location(1.5, 2.5), attributes={"secret": "x"})
    assert {"email", "location", "attributes"}.isdisjoint(profile.public_view())
    assert profile.own_view()["location"] == {"lat": 1.5, "lon": 2.5}
    assert (await quiet.profiles.public(new_id())).body is None


@pytest.mark.sabotage(path="app/domain/profiles/service.py", take_out="                    attributes={},\n", put="")
async def test_erasing_leaves_no_personal_data_in_any_table(quiet: Resources, servers: Servers) -> None:
    mark = uuid4().hex
    email = f"{mark}@example.com"
    profile = await quiet.profiles.sign_up(
        NewProfile(email, PASSWORD, f"Name {mark}", f"Bio {mark}", Location(1, 2), {"likes": mark})
    )
    await quiet.profiles.change(profile.id, 1, {"bio": f"New bio {mark}"})
    await quiet.sessions.sign_in(email, PASSWORD, f"browser of {mark}")
    assert await _holding(servers, mark)
    with pytest.raises(PreconditionFailed):
        await quiet.profiles.erase(profile.id, 1)
    await quiet.profiles.erase(profile.id, 2)
    await quiet.sessions.end_all(profile.id)
    assert await _holding(servers, mark) == []
    assert (await quiet.profiles.public(profile.id)).body is None
    assert await page(quiet, prefix=f"Name {mark}") == []
    with pytest.raises(NotFound):
        await quiet.profiles.own(profile.id)
    with pytest.raises(NotFound):
        await quiet.profiles.erase(profile.id, 3)
    assert await quiet.profiles.sign_up(NewProfile(email, PASSWORD, "Somebody new"))


async def _holding(servers: Servers, mark: str) -> list[str]:
    """Return every table of which a row holds the text, in whatever column."""
    found = []
    for table in await servers.sql("primary", WORDS.tables):
        name = table["name"]
        rows = await servers.sql("primary", f"SELECT * FROM {name}")  # noqa: S608  # our own tables
        found += [name for row in rows if mark in str(dict(row))][:1]
    return found
