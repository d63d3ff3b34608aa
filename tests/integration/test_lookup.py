"""Lookups answer as SQLAlchemy would, on either engine, and leave their connection as they found it."""

import asyncio
from typing import Any
from uuid import uuid4

import pytest
from conftest import PATIENCE, until
from engines import WORDS
from quiet import Servers, started
from sqlalchemy import bindparam, literal_column, select, text

from app.domain.catalog.rules import NewProduct
from app.domain.catalog.tables import products
from app.domain.profiles.rules import Location, NewProfile, Profile
from app.domain.profiles.tables import profiles
from app.scaling import dialect
from app.scaling.lookup import Lookup
from app.wiring import Resources

pytest_plugins = ("quiet",)

PROFILE = Lookup(select(profiles).where(profiles.c.profile_id == bindparam("profile_id")))
PRODUCT = Lookup(select(products).where(products.c.sku == bindparam("sku"), products.c.version >= bindparam("version")))
SLEEP = Lookup(select(literal_column(WORDS.sleep.removeprefix("SELECT ")).label("slept")))


async def new_profile(quiet: Resources) -> Profile:
    return await quiet.profiles.sign_up(
        NewProfile(f"{uuid4().hex}@example.com", "three calm otters", "Zoë", "Bio", Location(51.5, -0.13), {"a": [1]})
    )


async def test_a_lookup_answers_as_the_statement_does(quiet: Resources) -> None:
    profile = await new_profile(quiet)
    reader = quiet.database.reader(profile.id, newest=True)
    plain = await reader.first(select(profiles).where(profiles.c.profile_id == profile.id))
    found = await reader.find(PROFILE, profile_id=profile.id)
    assert plain is not None
    assert found._asdict() == plain._asdict()
    assert found.attributes == {"a": [1]}
    assert found.created_at == profile.created_at
    assert await reader.find(PROFILE, profile_id=uuid4()) is None


@pytest.mark.sabotage(
    path="app/scaling/lookup.py",
    take_out="tuple(named[name] if convert is None else convert(named[name]) for name, convert in self.binds)",
    put="tuple(named.values())",
)
async def test_a_lookup_takes_values_by_name_in_any_order_and_reads_every_type(quiet: Resources) -> None:
    new = NewProduct(f"LAMP-{uuid4().hex[:12]}", "Lamp", "Of oak.", "lamps", 1999, "EUR", {"oak": True}, 7)
    product = await quiet.catalog.create(new)
    reader = quiet.database.reader(newest=True)
    plain = await reader.first(select(products).where(products.c.sku == product.sku))
    found = await reader.find(PRODUCT, version=1, sku=product.sku)
    assert plain is not None
    assert found._asdict() == plain._asdict()
    assert await reader.find(PRODUCT, version=2, sku=product.sku) is None


def test_a_value_that_is_fixed_in_the_statement_is_refused_when_it_is_first_asked(quiet: Resources) -> None:
    fixed = Lookup(select(products).where(products.c.sku == "LAMP"))
    engine = quiet.database.shards[0].replicas.primary.reads.engine
    with pytest.raises(ValueError, match="LAMP"):
        fixed.compiled(engine.dialect)


@pytest.mark.sabotage(
    path="app/scaling/connections.py",
    take_out="        if self._kept:\n            self._kept",
    put="        if False:\n            self._kept",
)
@pytest.mark.parametrize("ask", ["find", "first"])
async def test_who_goes_away_in_the_middle_of_an_answer_leaves_nothing_of_it_behind(quiet: Resources, ask: str) -> None:
    profile = await new_profile(quiet)
    async with started(quiet, pool_size=1) as database:
        (replica, *_), statement = database.shards[0].replicas.nodes, select(literal_column("1").label("one"))

        async def asks() -> bool:
            return bool(replica.in_use)

        def sleeping() -> Any:
            return replica.find(SLEEP, {}) if ask == "find" else replica.all(SLEEP._statement)

        for _ in range(3):
            leaving = asyncio.create_task(sleeping())
            await until(asks)
            leaving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await leaving
            assert not replica.in_use
            async with asyncio.timeout(PATIENCE):
                (row,) = await replica.find(PROFILE, {"profile_id": profile.id})
                assert row.profile_id == profile.id
                ((one,),) = await replica.all(statement)
                assert one == 1


@pytest.mark.sabotage(
    path="app/scaling/connections.py",
    take_out="if not dialect.is_cut(connection.driver_connection):",
    put="if connection:",
)
async def test_a_lookup_meets_no_connection_that_its_server_has_closed(quiet: Resources, servers: Servers) -> None:
    profile = await new_profile(quiet)
    async with started(quiet, pool_size=1) as database:
        primary = database.shards[0].replicas.primary
        (row,) = await primary.all(text(WORDS.own_id))

        async def is_cut() -> bool:
            return dialect.is_cut(primary.reads._kept[0].driver_connection)

        assert await primary.find(PROFILE, {"profile_id": profile.id})
        await servers.sql("primary", WORDS.end, row.id)
        await until(is_cut)
        assert await primary.find(PROFILE, {"profile_id": profile.id})
