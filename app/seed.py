"""The demonstration data of the local cluster: a shop's catalog, three warehouses, ten thousand profiles.

Everything has an id and a value derived from its number, so that two clusters hold the same shop, and a run that was
cut off is simply repeated: what is there stays.
"""

import asyncio
import hashlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import islice
from typing import Any
from uuid import UUID

from sqlalchemy import Table

from app.core.errors import Unavailable
from app.core.ids import LOGICAL_SHARDS
from app.core.settings import load_settings
from app.domain.catalog.tables import products, stock, warehouses
from app.domain.profiles.rules import ADMIN, MEMBER, email_key
from app.domain.profiles.tables import email_directory, profiles
from app.scaling.database import Writer
from app.scaling.dialect import insert_ignore
from app.scaling.lifecycle import Lifecycle
from app.wiring import Resources, open_resources

PASSWORD = "correct horse battery"  # noqa: S105  # printed by `make run`; these accounts exist only in a local cluster
PROFILES = 10_000
PRODUCTS = 1_000
BATCH = 1_000  # rows a statement: large enough to be fast, small enough for one round trip's memory
# Seconds: in a stack that starts all at once the servers are busy, and what is refused for a moment is tried again.
PATIENCE = 60.0
EPOCH = datetime(2026, 1, 1, tzinfo=UTC)

# Each with address, name, tier and role.
PEOPLE = (
    ("ada@example.com", "Ada Lovelace", "enterprise", MEMBER),
    ("alan@example.com", "Alan Turing", "free", MEMBER),
    ("admin@example.com", "Grace Hopper", "enterprise", ADMIN),
)
WAREHOUSES = (("Hamburg", 53.55, 9.99), ("Lyon", 45.76, 4.84), ("Warsaw", 52.23, 21.01))
GIVEN_NAMES = ("Amara", "Björn", "Chloé", "Dmitri", "Elif", "Farah", "Goran", "Hana", "Ines", "Jun")
FAMILY_NAMES = ("Almeida", "Brandt", "Costa", "Dubois", "Eriksen", "Fischer", "Garcia", "Horvat", "Ivanova", "Jansen")
CITIES = (("Berlin", 52.52, 13.4), ("Paris", 48.86, 2.35), ("Vienna", 48.21, 16.37), ("Gdansk", 54.35, 18.65))
MATERIALS = ("Oak", "Walnut", "Linen", "Wool", "Brass", "Slate", "Cork", "Copper", "Birch", "Stoneware")
STYLES = ("Folding", "Nordic", "Pocket", "Studio", "Garden", "Travel", "Harbour", "Classic", "Mountain", "Evening")
# Each with its category, what it is for and its price in cents.
THINGS = (
    ("Chair", "furniture", "for long evenings at the table", 12_900),
    ("Desk Lamp", "lighting", "with a warm, quiet light", 8_900),
    ("Blanket", "textiles", "for the colder half of the year", 6_490),
    ("Notebook", "stationery", "with 160 numbered pages", 1_490),
    ("Backpack", "travel", "with room for a weekend", 9_900),
    ("Teapot", "kitchen", "that pours without a drop beside", 4_990),
    ("Bookshelf", "furniture", "that carries what you have read", 24_900),
    ("Candle Holder", "lighting", "for a table set for guests", 2_490),
    ("Apron", "kitchen", "with two pockets and long bands", 3_490),
    ("Planter", "garden", "for herbs within reach of the stove", 2_990),
)


def run() -> None:
    """Seed the databases that the environment names.

    Raises:
        Unavailable: they could not be written to for a minute.
    """
    asyncio.run(_run())


async def _run() -> None:
    async with open_resources(load_settings()) as resources:
        lifecycle = Lifecycle()
        try:
            async with asyncio.timeout(PATIENCE):
                await lifecycle.start({"demonstration data": partial(seed, resources, print)})
        except TimeoutError as error:
            raise Unavailable(lifecycle.waiting_for or "The databases are too slow for it.") from error


async def seed(resources: Resources, say: Callable[[str], None]) -> None:
    """Insert what is missing of the demonstration data.

    Args:
        resources: of this process.
        say: told one line for each part, for people who wait.
    """
    async with resources.database.writer() as writer:
        await _insert(writer, warehouses, _warehouses())
        await _insert(writer, products, _products())
        await _insert(writer, stock, _stock())
    say(f"{PRODUCTS:,} products in {len(WAREHOUSES)} warehouses")
    secret = resources.settings.service.secret
    password_hash = await resources.passwords.hash(PASSWORD)
    async with resources.database.writer() as writer:
        await _insert(writer, email_directory, _addresses(secret))
    places = await resources.database.map.now()
    for shard in range(len(resources.database.shards)):
        rows = (row for row in _profiles(password_hash) if places.shard_of(row["profile_id"]) == shard)
        async with resources.database.writer_of(shard) as writer:
            await _insert(writer, profiles, rows)
    say(f"{PROFILES:,} profiles, each with the password “{PASSWORD}”")


async def _insert(writer: Writer, table: Table, rows: Iterator[dict[str, Any]]) -> None:
    while batch := list(islice(rows, BATCH)):
        await writer.run(insert_ignore(table), batch)


def _id(kind: str, number: int) -> UUID:
    """Return the id of the number-th thing of a kind: shaped as in `core/ids.py`, spread over all logical shards."""
    milliseconds = int(_moment(number).timestamp() * 1000)
    noise = int.from_bytes(hashlib.sha256(f"{kind} {number}".encode()).digest()[:8])
    shard = number % LOGICAL_SHARDS
    return UUID(int=milliseconds << 80 | 8 << 76 | shard << 66 | 2 << 62 | noise >> 2)


def _moment(number: int) -> datetime:
    return EPOCH + timedelta(minutes=number)


def _warehouses() -> Iterator[dict[str, Any]]:
    for number, (name, lat, lon) in enumerate(WAREHOUSES):
        yield {"id": _id("warehouse", number), "name": name, "lat": lat, "lon": lon}


def _pieces(product: int, warehouse: int) -> int:
    return 20 + (product * 7 + warehouse * 31) % 180


def _products() -> Iterator[dict[str, Any]]:
    for number in range(PRODUCTS):
        thing, category, purpose, price = THINGS[number % 10]
        style, material = STYLES[number // 10 % 10], MATERIALS[number // 100 % 10]
        yield {
            "id": _id("product", number),
            "sku": f"NP-{number:04d}",
            "name": f"{style} {thing}, {material}",
            "description": f"{style} {thing.lower()} of {material.lower()}, {purpose}.",
            "category": category,
            "amount": price + number // 10 * 10,
            "currency": "EUR",
            "attributes": {"material": material.lower(), "style": style.lower()},
            "available": sum(_pieces(number, warehouse) for warehouse in range(len(WAREHOUSES))),
            "version": 1,
            "revision": 1,
            "created_at": _moment(number),
            "updated_at": _moment(number),
        }


def _stock() -> Iterator[dict[str, Any]]:
    for number in range(PRODUCTS):
        for warehouse in range(len(WAREHOUSES)):
            yield {
                "product_id": _id("product", number),
                "warehouse_id": _id("warehouse", warehouse),
                "free": _pieces(number, warehouse),
            }


def _people() -> Iterator[tuple[int, str, str, str, str]]:
    for number in range(PROFILES):
        if number < len(PEOPLE):
            yield number, *PEOPLE[number]
            continue
        name = f"{GIVEN_NAMES[number % 10]} {FAMILY_NAMES[number // 10 % 10]}"
        yield number, f"customer{number:05d}@example.com", name, ("free", "pro", "enterprise")[number % 3], MEMBER


def _addresses(secret: bytes) -> Iterator[dict[str, Any]]:
    for number, address, *_ in _people():
        yield {
            "email_key": email_key(secret, address),
            "profile_id": _id("profile", number),
            "confirmed": 1,
            "reserved_at": _moment(number),
        }


def _profiles(password_hash: str) -> Iterator[dict[str, Any]]:
    for number, address, name, tier, role in _people():
        city, lat, lon = CITIES[number % len(CITIES)]
        yield {
            "profile_id": _id("profile", number),
            "email": address,
            "password_hash": password_hash,
            "name": name,
            "bio": None,
            "tier": tier,
            "role": role,
            "lat": lat,
            "lon": lon,
            "attributes": {"city": city.lower()},
            "version": 1,
            "created_at": _moment(number),
            "updated_at": _moment(number),
        }
