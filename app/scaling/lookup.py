"""Statements that are asked again and again: compiled once for each engine, and sent by the driver itself.

To build, recognise and execute a statement takes SQLAlchemy ten times what the driver needs to send it and read its
answer. For a page that is little, for one row that is not cached it is most of the cost. A `Lookup` has names in place
of its values, so its text is known for good; types are converted as SQLAlchemy would.
"""

from collections import namedtuple
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from sqlalchemy import Dialect, Float, Select
from sqlalchemy.types import TypeEngine

_Convert = Callable[[Any], Any] | None


class Compiled(NamedTuple):
    """A lookup for one engine: its text, and what happens to values on their way out and to columns on their way back.

    Attributes:
        text: as the driver takes it.
        binds: name and conversion of each value, in the order in which the text wants them.
        columns: conversion of each column.
        converts: whether any column needs one.
        row: makes a row of converted columns.
    """

    text: str
    binds: tuple[tuple[str, _Convert], ...]
    columns: tuple[_Convert, ...]
    converts: bool
    row: Any

    def values(self, named: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return the values in their order, as the driver takes them."""
        return tuple(named[name] if convert is None else convert(named[name]) for name, convert in self.binds)

    def read(self, columns: Any) -> Any:
        """Return a row of the driver's as one whose columns are attributes."""
        if not self.converts:
            return self.row._make(columns)
        pairs = zip(self.columns, columns, strict=True)
        return self.row._make(value if convert is None else convert(value) for convert, value in pairs)


class Lookup:
    """A statement that finds rows by named values; make it once, when its module is loaded.

    Args:
        statement: with a `bindparam` for each value that differs from call to call.
    """

    def __init__(self, statement: Select[Any]) -> None:
        self._statement = statement
        self._row = _row_of([str(column.key) for column in statement.selected_columns])
        self._compiled: dict[str, Compiled] = {}

    def compiled(self, dialect: Dialect) -> Compiled:
        """Return what is sent to an engine of this dialect."""
        found = self._compiled.get(dialect.name)
        if found is None:
            found = self._compiled[dialect.name] = self._compile(dialect)
        return found

    def _compile(self, dialect: Dialect) -> Compiled:
        compiled: Any = self._statement.compile(dialect=dialect)
        fixed = compiled.params

        def binding(name: str) -> tuple[str, _Convert]:
            if not compiled.binds[name].required:
                raise ValueError(f"{name} has the fixed value {fixed[name]}; a lookup takes each of its values by name")
            return name, _impl(compiled.binds[name].type, dialect).bind_processor(dialect)

        columns = tuple(_reading(column.type, dialect) for column in self._statement.selected_columns)
        binds = tuple(binding(name) for name in compiled.positiontup or ())
        return Compiled(str(compiled), binds, columns, any(columns), self._row)


def _reading(type_: TypeEngine[Any], dialect: Dialect) -> _Convert:
    if isinstance(type_, Float):  # every driver reads one as such; SQLAlchemy would ask what kind the server says it is
        return None
    return _impl(type_, dialect).result_processor(dialect, None)


def _row_of(columns: list[str]) -> Any:
    return namedtuple("Row", columns)  # noqa: PYI024  # they are not known before


def _impl(type_: TypeEngine[Any], dialect: Dialect) -> TypeEngine[Any]:
    return type_.dialect_impl(dialect)
