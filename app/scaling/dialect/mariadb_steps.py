"""How Alembic's operations run on MariaDB, which commits every change of a table at once.

A step that was cut off half-way is simply run again: what is there already is left as it is. An index that PostgreSQL
has on an expression stands on a generated column of the expression's label; one of a kind that MariaDB lacks is left
out.
"""

from typing import Any, Literal

from alembic.ddl.mysql import MariaDBImpl
from alembic.operations.schemaobj import SchemaObjects
from sqlalchemy import Column, Computed, Index, String, Table, inspect
from sqlalchemy.sql.elements import Label

# Kinds of PostgreSQL's that have no counterpart here, unless the index names one with `mariadb_prefix`.
_LACKING = frozenset({"gin", "gist"})
_LONGEST = 255  # characters of a generated column; no text that is indexed so is longer


class MariaDbImpl(MariaDBImpl):
    """Alembic's operations for the dialect of this name; defining it is all that it takes."""

    __dialect__ = "mariadb"
    type_synonyms = (*MariaDBImpl.type_synonyms, {"FLOAT", "DOUBLE"})

    def create_table(self, table: Table, **options: Any) -> None:
        """Create a table that is not there yet."""
        if not inspect(self.connection).has_table(table.name):
            super().create_table(table, **options)

    def add_column(self, table_name: str, column: Column[Any], **options: Any) -> None:
        """Add a column that is not there yet."""
        if column.name not in self._names("columns", table_name):
            super().add_column(table_name, column, **options)

    def create_index(self, index: Index, **options: Any) -> None:
        """Create an index that is not there yet, on generated columns where it has expressions."""
        if index.table is None or self._is_lacking(index) or index.name in self._names("indexes", index.table.name):
            return
        table = index.table.name
        labels = [each for each in index.expressions if isinstance(each, Label)]
        for label in labels:
            self.add_column(table, Column(label.name, String(_LONGEST), Computed(label.element, persisted=False)))
        if labels:
            names = [label.name for label in labels]
            index = SchemaObjects().index(index.name, table, names, unique=bool(index.unique))
        super().create_index(index, **options)

    def drop_index(self, index: Index, **options: Any) -> None:
        """Drop an index that is there."""
        if index.table is not None and index.name in self._names("indexes", index.table.name):
            super().drop_index(index, **options)

    def correct_for_autogen_constraints(
        self,
        conn_unique_constraints: set[Any],
        conn_indexes: set[Any],
        metadata_unique_constraints: set[Any],
        metadata_indexes: set[Any],
    ) -> None:
        """Leave out of a comparison the indexes that are meant to differ from the models'."""
        super().correct_for_autogen_constraints(  # type: ignore[no-untyped-call]  # Alembic leaves it untyped
            conn_unique_constraints, conn_indexes, metadata_unique_constraints, metadata_indexes
        )
        differing = {
            index.name
            for index in metadata_indexes
            if self._is_lacking(index) or any(isinstance(each, Label) for each in index.expressions)
        }
        for indexes in (conn_indexes, metadata_indexes):
            indexes -= {index for index in indexes if index.name in differing}

    def _is_lacking(self, index: Index) -> bool:
        kind = index.dialect_options["postgresql"]["using"]
        return kind in _LACKING and not index.dialect_options["mariadb"]["prefix"]

    def _names(self, of: Literal["columns", "indexes"], table: str) -> set[str | None]:
        found = inspect(self.connection)
        return {each["name"] for each in (found.get_columns if of == "columns" else found.get_indexes)(table)}
