"""Statements that engines write differently, as constructs that each engine compiles in its own words.

Callers build them like any other SQLAlchemy expression; nobody asks which engine it is for.
"""

from typing import Any

from sqlalchemy import Column, ColumnElement, Integer, Table, type_coerce
from sqlalchemy.dialects.postgresql import JSONB, Insert, insert
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement


def insert_ignore(table: Table) -> Insert:
    """Return an insert that touches no row, and raises nothing, where the key is there already.

    It waits for a transaction that is inserting the same key.
    """
    return insert(table).on_conflict_do_nothing()


def json_contains(column: Column[Any], value: dict[str, Any]) -> ColumnElement[bool]:
    """Return the condition that the column's JSON object has all of `value`; an index answers it."""
    return type_coerce(column, JSONB).contains(value)


class LogicalShard(FunctionElement[int]):
    """The logical shard that an id carries, read by the database: bits 4 to 13 of bytes 6 and 7 (`core/ids.py`)."""

    type = Integer()
    name = "logical_shard"
    inherit_cache = True


@compiles(LogicalShard)
def _logical_shard(element: LogicalShard, compiler: SQLCompiler, **options: Any) -> str:
    raw = f"uuid_send({compiler.process(element.clauses, **options)})"
    return f"(((get_byte({raw}, 6) & 15) << 6) | (get_byte({raw}, 7) >> 2))"


@compiles(LogicalShard, "mysql")
@compiles(LogicalShard, "mariadb")
def _logical_shard_of_text(element: LogicalShard, compiler: SQLCompiler, **options: Any) -> str:
    # An id is text there, with hyphens or without: its 14th to 16th digit are the logical shard and two random bits.
    digits = f"SUBSTR(REPLACE(CAST({compiler.process(element.clauses, **options)} AS CHAR), '-', ''), 14, 3)"
    return f"(CONV({digits}, 16, 10) DIV 4)"


def logical_shard_of(owner: ColumnElement[Any]) -> ColumnElement[int]:
    """Return the logical shard of the ids in a column."""
    return LogicalShard(owner)
