"""How SQLAlchemy speaks to MariaDB here: the types of our columns, and tables whose texts compare byte by byte.

Tables and migrations name generic types only. An id becomes BINARY(16), in byte order, so that ids stay sorted by age
(a native UUID would do that too, from 10.11.5 on); a moment becomes DATETIME(6) in UTC and comes back aware.
"""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from sqlalchemy import DateTime, Dialect, Table, Uuid
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.mysql.aiomysql import MySQLDialect_aiomysql
from sqlalchemy.dialects.mysql.base import MySQLDDLCompiler, MySQLTypeCompiler
from sqlalchemy.dialects.mysql.mariadb import MariaDBDialect
from sqlalchemy.types import TypeEngine

# The default collation would call "a", "A" and "a " one key.
_TABLE_OPTIONS = " ENGINE=InnoDB DEFAULT CHARSET=utf8mb4 COLLATE=utf8mb4_nopad_bin"


DRIVER = "mariadb+scaleout"  # what this dialect is called in SQLAlchemy's URLs


class _BinaryUuid(Uuid[UUID]):
    """An id as its sixteen bytes."""

    def bind_processor(self, dialect: Dialect) -> Callable[[Any], Any]:  # noqa: ARG002  # SQLAlchemy's
        return lambda value: None if value is None else value.bytes

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], Any]:  # noqa: ARG002
        return lambda value: None if value is None else UUID(bytes=value)


class _Moment(DateTime):
    """A moment in UTC, to the microsecond."""

    def bind_processor(self, dialect: Dialect) -> Callable[[Any], Any]:  # noqa: ARG002  # SQLAlchemy's
        return lambda value: None if value is None else value.astimezone(UTC).replace(tzinfo=None)

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], Any]:  # noqa: ARG002
        def aware(value: datetime | None) -> datetime | None:
            return None if value is None else value.replace(tzinfo=UTC)

        return aware


_OURS: dict[type[TypeEngine[Any]], type[TypeEngine[Any]]] = {Uuid: _BinaryUuid, DateTime: _Moment}


class _Types(MySQLTypeCompiler):
    def visit_uuid(self, type_: Any, **_: Any) -> str:  # noqa: ARG002  # SQLAlchemy's
        return "BINARY(16)"

    def visit_datetime(self, type_: Any, **_: Any) -> str:  # noqa: ARG002
        return "DATETIME(6)"


class _Tables(MySQLDDLCompiler):
    def post_create_table(self, table: Table) -> str:
        return super().post_create_table(table) + _TABLE_OPTIONS


class MariaDb(MariaDBDialect, MySQLDialect_aiomysql):
    """MariaDB through aiomysql with our types; refuses a MySQL server, whose GTIDs are others."""

    supports_statement_cache = True
    type_compiler_cls = _Types
    ddl_compiler = _Tables

    def type_descriptor(self, typeobj: TypeEngine[Any]) -> TypeEngine[Any]:
        """Return how a column type is meant here."""
        ours = _OURS.get(type(typeobj))
        if ours is not None:
            return typeobj.adapt(ours)
        theirs: TypeEngine[Any] = super().type_descriptor(typeobj)  # type: ignore[no-untyped-call]  # untyped there
        return theirs


registry.register(DRIVER.replace("+", "."), __name__, MariaDb.__name__)
