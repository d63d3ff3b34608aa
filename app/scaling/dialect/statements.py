"""Statements that engines write differently, as constructs that each engine compiles in its own words.

Callers build them like any other SQLAlchemy expression; nobody asks which engine it is for.
"""

from typing import Any

from sqlalchemy import Column, ColumnElement, Table, type_coerce
from sqlalchemy.dialects.postgresql import JSONB, Insert, insert


def insert_ignore(table: Table) -> Insert:
    """Return an insert that touches no row, and raises nothing, where the key is there already.

    It waits for a transaction that is inserting the same key.
    """
    return insert(table).on_conflict_do_nothing()


def json_contains(column: Column[Any], value: dict[str, Any]) -> ColumnElement[bool]:
    """Return the condition that the column's JSON object has all of `value`; an index answers it."""
    return type_coerce(column, JSONB).contains(value)
