"""Statements that engines word differently, as constructs that each engine compiles in its own words.

Callers build them like any other SQLAlchemy expression; nobody asks which engine it is for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import JSON, Column, ColumnElement, Dialect, Float, Integer, String, Table, literal, literal_column
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql import Insert, Update
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import NULLTYPE, TypeDecorator

from app.core import wire
from app.scaling.dialect.wording import boolean_query

POSTGRESQL, MARIADB = "postgresql", "mariadb"


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of one table that are yet to be inserted, each with the same columns by name."""

    table: Table
    values: Sequence[Mapping[str, Any]]


def insert_ignore(table: Table) -> Insert:
    """Return an insert that touches no row, and raises nothing, where the key is there already.

    It waits for a transaction that is inserting the same key, and locks the row that it finds.
    """
    return _InsertIgnore(table)


def insert_adding(table: Table) -> Insert:
    """Return an insert that, where the key is there already, adds to every other column of that row instead."""
    return _InsertAdding(table)


def by_primary_key(change: Update) -> Update:
    """Return a change of a row that finds it by its primary key and by nothing else.

    MariaDB may take a foreign key's index instead, and locks that first: in another order than everybody else.
    """
    return change.with_hint("FORCE INDEX (PRIMARY)", dialect_name=MARIADB)


def json_has(column: Column[Any], key: str, value: str | float) -> ColumnElement[bool]:
    """Return the condition that the column's JSON object has `key` with exactly this text, number or truth."""
    whole = literal({key: value}, JSON().with_variant(JSONB(), POSTGRESQL))
    return _JsonHas(column, whole, literal(value, JSON()), literal(f"$.{wire.encode(key).decode()}", String()))


def begins_with(column: Column[Any], prefix: str) -> ColumnElement[bool]:
    """Return the condition that the column's text begins with `prefix`, in any case; an index answers it."""
    pattern = prefix.lower().replace("\\", r"\\").replace("%", r"\%").replace("_", r"\_") + "%"
    return _Lower(column).like(pattern, escape="\\")


def search_words(heavy: str, light: str) -> ColumnElement[Any]:
    """Return what a search column is computed from: two text columns, of which the first counts more."""
    return _SearchWords(literal_column(heavy), literal_column(light))


def matches(words: Column[Any], text: str) -> ColumnElement[bool]:
    """Return the condition that a search column has what people typed: words, "quoted phrases", or and -not."""
    return _Matches(words, literal(text, _Typed()))


def match_rank(words: Column[Any], text: str) -> ColumnElement[float]:
    """Return how well it matches, as a double, because a cursor must carry the very number that is compared."""
    return _Rank(words, literal(text, _Typed()))


def logical_shard_of(owner: ColumnElement[Any]) -> ColumnElement[int]:
    """Return the logical shard of the ids in a column."""
    return _LogicalShard(owner)


class _InsertIgnore(Insert):
    inherit_cache = True


@compiles(_InsertIgnore, POSTGRESQL)
def _(insert: _InsertIgnore, compiler: SQLCompiler, **options: Any) -> str:
    inserted = compiler.visit_insert(insert, **options)  # type: ignore[no-untyped-call]  # SQLAlchemy leaves it untyped
    return f"{inserted} ON CONFLICT DO NOTHING"


@compiles(_InsertIgnore, MARIADB)
def _(insert: _InsertIgnore, compiler: SQLCompiler, **options: Any) -> str:
    # INSERT IGNORE would swallow other errors, too, and lock the row it finds for reading only: two that then change it
    # would wait for each other.
    key = compiler.preparer.format_column(next(iter(insert.table.primary_key)))
    inserted = compiler.visit_insert(insert, **options)  # type: ignore[no-untyped-call]  # SQLAlchemy leaves it untyped
    return f"{inserted} ON DUPLICATE KEY UPDATE {key} = {key}"


class _InsertAdding(Insert):
    inherit_cache = True


@compiles(_InsertAdding, POSTGRESQL)
def _(insert: _InsertAdding, compiler: SQLCompiler, **options: Any) -> str:
    inserted = compiler.visit_insert(insert, **options)  # type: ignore[no-untyped-call]  # SQLAlchemy leaves it untyped
    key = ", ".join(column.name for column in insert.table.primary_key)
    table = compiler.preparer.format_table(insert.table)
    sums = ", ".join(f"{name} = {table}.{name} + excluded.{name}" for name in _beside_the_key(insert))
    return f"{inserted} ON CONFLICT ({key}) DO UPDATE SET {sums}"


@compiles(_InsertAdding, MARIADB)
def _(insert: _InsertAdding, compiler: SQLCompiler, **options: Any) -> str:
    inserted = compiler.visit_insert(insert, **options)  # type: ignore[no-untyped-call]  # SQLAlchemy leaves it untyped
    sums = ", ".join(f"{name} = {name} + VALUES({name})" for name in _beside_the_key(insert))
    return f"{inserted} ON DUPLICATE KEY UPDATE {sums}"


def _beside_the_key(insert: _InsertAdding) -> list[str]:
    return [column.name for column in insert.table.columns if not column.primary_key]


class _JsonHas(FunctionElement[Any]):
    type = NULLTYPE  # as a Boolean, MariaDB would be asked whether it equals 1
    inherit_cache = True


@compiles(_JsonHas, POSTGRESQL)
def _(has: _JsonHas, compiler: SQLCompiler, **options: Any) -> str:
    column, whole, _value, _path = has.clauses
    return f"{compiler.process(column, **options)} @> {compiler.process(whole, **options)}"


@compiles(_JsonHas, MARIADB)
def _(has: _JsonHas, compiler: SQLCompiler, **options: Any) -> str:
    column, value, path = (compiler.process(has.clauses.clauses[each], **options) for each in (0, 2, 3))
    # A list that has the value among others contains it there, and is something else.
    return f"(JSON_CONTAINS({column}, {value}, {path}) AND JSON_TYPE(JSON_EXTRACT({column}, {path})) <> 'ARRAY')"


class _Lower(FunctionElement[str]):
    type = String()
    inherit_cache = True


@compiles(_Lower, POSTGRESQL)
def _(lower: _Lower, compiler: SQLCompiler, **options: Any) -> str:
    return f"lower({compiler.process(lower.clauses, **options)})"


@compiles(_Lower, MARIADB)
def _(lower: _Lower, compiler: SQLCompiler, **options: Any) -> str:
    # No index on an expression there: the index's expression is a generated column, which bears the index's label.
    (column,) = lower.clauses
    table, dot, _name = compiler.process(column, **options).rpartition(".")
    return f"{table}{dot}{compiler.preparer.quote(f'{column.name}_lower')}"


class _SearchWords(FunctionElement[Any]):
    inherit_cache = True


@compiles(_SearchWords, POSTGRESQL)
def _(words: _SearchWords, compiler: SQLCompiler, **options: Any) -> str:
    heavy, light = (compiler.process(clause, **options) for clause in words.clauses)
    return f"setweight(to_tsvector('english', {heavy}), 'A') || setweight(to_tsvector('english', {light}), 'B')"


@compiles(_SearchWords, MARIADB)
def _(words: _SearchWords, compiler: SQLCompiler, **options: Any) -> str:
    # A word that occurs twice as often weighs more.
    heavy, light = (compiler.process(clause, **options) for clause in words.clauses)
    return f"concat({heavy}, ' ', {heavy}, ' ', {light})"


class _Typed(TypeDecorator[str]):
    """A search as people type it, which PostgreSQL reads as it is."""

    impl = String
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return boolean_query(value) if value is not None and dialect.name == MARIADB else value


class _Matches(FunctionElement[Any]):
    type = NULLTYPE  # see above; MariaDB's answer is the rank
    inherit_cache = True


@compiles(_Matches, POSTGRESQL)
def _(match: _Matches, compiler: SQLCompiler, **options: Any) -> str:
    words, text = (compiler.process(clause, **options) for clause in match.clauses)
    return f"{words} @@ websearch_to_tsquery('english', {text})"


class _Rank(FunctionElement[float]):
    type = Float(53)
    inherit_cache = True


@compiles(_Rank, POSTGRESQL)
def _(rank: _Rank, compiler: SQLCompiler, **options: Any) -> str:
    words, text = (compiler.process(clause, **options) for clause in rank.clauses)
    return f"CAST(ts_rank({words}, websearch_to_tsquery('english', {text})) AS FLOAT(53))"


@compiles(_Matches, MARIADB)
@compiles(_Rank, MARIADB)
def _(match: _Matches | _Rank, compiler: SQLCompiler, **options: Any) -> str:
    words, text = (compiler.process(clause, **options) for clause in match.clauses)
    return f"MATCH({words}) AGAINST ({text} IN BOOLEAN MODE)"


class _LogicalShard(FunctionElement[int]):
    """Bits 4 to 13 of bytes 6 and 7 of an id (`core/ids.py`)."""

    type = Integer()
    name = "logical_shard"
    inherit_cache = True


@compiles(_LogicalShard, POSTGRESQL)
def _(shard: _LogicalShard, compiler: SQLCompiler, **options: Any) -> str:
    raw = f"uuid_send({compiler.process(shard.clauses, **options)})"
    return f"(((get_byte({raw}, 6) & 15) << 6) | (get_byte({raw}, 7) >> 2))"


@compiles(_LogicalShard, MARIADB)
def _(shard: _LogicalShard, compiler: SQLCompiler, **options: Any) -> str:
    # The 14th to 16th hexadecimal digit are the logical shard and two random bits.
    return f"(CONV(SUBSTR(HEX({compiler.process(shard.clauses, **options)}), 14, 3), 16, 10) DIV 4)"
