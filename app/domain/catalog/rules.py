"""What is true of stock: which warehouse ships what, and when an order cannot be served."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from math import asin, cos, radians, sin, sqrt
from typing import Any
from uuid import UUID

EARTH_RADIUS = 6371.0  # km


@dataclass(frozen=True, slots=True)
class NewProduct:
    """What an admin gives for a product. `stock` pieces go to the first warehouse."""

    sku: str
    name: str
    description: str
    category: str
    amount: int
    currency: str
    attributes: dict[str, Any]
    stock: int


@dataclass(frozen=True, slots=True)
class Product:
    """A product as stored.

    Attributes:
        amount: price in minor units, tax included.
        available: pieces that can be ordered, over all warehouses.
        version: counts edits; what `If-Match` names.
        revision: counts edits and stock movements; what caches compare.
    """

    id: UUID
    sku: str
    name: str
    description: str
    category: str
    amount: int
    currency: str
    attributes: dict[str, Any]
    available: int
    version: int
    revision: int
    created_at: datetime
    updated_at: datetime

    def view(self) -> dict[str, Any]:
        """Return what anybody may see."""
        return {
            "id": self.id,
            "sku": self.sku,
            "name": self.name,
            "description": self.description,
            "category": self.category,
            "price": {"amount": self.amount, "currency": self.currency},
            "attributes": self.attributes,
            "available": self.available,
            "version": self.version,
            "created_at": self.created_at,
            "updated_at": self.updated_at,
        }


@dataclass(frozen=True, slots=True)
class Wanted:
    """So many pieces of a product."""

    product_id: UUID
    quantity: int


@dataclass(frozen=True, slots=True)
class OnHand:
    """So many free pieces of a product in a warehouse, and where that is."""

    product_id: UUID
    warehouse_id: UUID
    free: int
    lat: float
    lon: float


@dataclass(frozen=True, slots=True)
class Allocation:
    """So many pieces of a product that this warehouse ships."""

    product_id: UUID
    warehouse_id: UUID
    quantity: int


@dataclass(frozen=True, slots=True)
class Reserved:
    """All lines of the order are set aside."""

    allocations: tuple[Allocation, ...]


@dataclass(frozen=True, slots=True)
class OutOfStock:
    """Nothing is set aside, because there is not enough of these products."""

    product_ids: tuple[UUID, ...]


def distance(lat: float, lon: float, other_lat: float, other_lon: float) -> float:
    """Return the great-circle distance of two places in kilometres (haversine)."""
    phi, other_phi = radians(lat), radians(other_lat)
    half = sin((other_phi - phi) / 2) ** 2 + cos(phi) * cos(other_phi) * sin(radians(other_lon - lon) / 2) ** 2
    return 2 * EARTH_RADIUS * asin(min(1.0, sqrt(half)))


def allocate(
    wanted: Iterable[Wanted], stock: Sequence[OnHand], place: tuple[float, float] | None
) -> Reserved | OutOfStock:
    """Say which warehouse ships what.

    Each product ships from the nearest warehouse that has all of it, else from as few warehouses as possible, nearest
    first among equals. Without a place the fullest warehouse counts as the nearest. All lines, or nothing.

    Args:
        wanted: the order's lines; two lines of one product count together.
        stock: what is free.
        place: the customer's latitude and longitude.
    """
    needs: dict[UUID, int] = defaultdict(int)
    for line in wanted:
        needs[line.product_id] += line.quantity
    allocations: list[Allocation] = []
    missing: list[UUID] = []
    for product_id, quantity in needs.items():
        shelves = [shelf for shelf in stock if shelf.product_id == product_id and shelf.free > 0]
        shelves.sort(key=lambda shelf: distance(*place, shelf.lat, shelf.lon) if place else -shelf.free)
        if sum(shelf.free for shelf in shelves) < quantity:
            missing.append(product_id)
            continue
        whole = [shelf for shelf in shelves if shelf.free >= quantity]
        left = quantity
        for shelf in whole[:1] or sorted(shelves, key=lambda shelf: -shelf.free):
            taken = min(left, shelf.free)
            allocations.append(Allocation(product_id, shelf.warehouse_id, taken))
            left -= taken
            if not left:
                break
    return OutOfStock(tuple(missing)) if missing else Reserved(tuple(allocations))
