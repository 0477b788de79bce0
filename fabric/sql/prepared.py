"""Statements run so often that SQLAlchemy's own way to run them would cost more than they do.

They are written in its language, compiled by it once for each kind of database, and handed to the
driver: a lookup that takes SQLAlchemy 19 us takes 4. Errors come as it would raise them. Where
somebody listens to statements, as the audit log does, SQLAlchemy runs them as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NoReturn, TypeVar

from sqlalchemy import Connection, Delete, Dialect, Insert, Select, Update
from sqlalchemy.engine.interfaces import DBAPICursor
from sqlalchemy.exc import DBAPIError
from sqlalchemy.sql.compiler import SQLCompiler

from fabric.sql.database import is_undone

RowT = TypeVar("RowT", bound=tuple[Any, ...])

_Statement = Select[Any] | Insert | Update | Delete
_Processor = Callable[[Any], Any] | None
_Values = Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Form:
    """A statement as one kind of database takes it."""

    sql: str
    names: tuple[str, ...]
    processors: tuple[_Processor, ...]
    constants: _Values
    by_position: bool
    results: tuple[_Processor, ...]

    def bind(self, values: _Values) -> Any:
        """Return the driver's parameters."""
        known = {**self.constants, **values}
        bound = [
            known[name] if process is None else process(known[name])
            for name, process in zip(self.names, self.processors, strict=True)
        ]
        return bound if self.by_position else dict(zip(self.names, bound, strict=True))

    def own(self, values: _Values) -> dict[str, object]:
        """Return those of the values that it takes."""
        return {name: value for name, value in values.items() if name in self.names}


class Prepared:
    """A statement without rows. Where somebody listens to statements, as the audit log does, it is
    run as any other.

    Args:
        statement: What is run; it has no list that expands.
        columns: What an insert sets; all columns by default.
    """

    def __init__(self, statement: _Statement, *, columns: Sequence[str] | None = None) -> None:
        self._statement = statement
        self._columns = columns
        self._forms: dict[type[Dialect], _Form] = {}

    def run(self, connection: Connection, values: _Values) -> None:
        """Run it once.

        Raises:
            DBAPIError: The database refused it.
        """
        form = self._form(connection)
        if _is_heard(connection):
            connection.execute(self._statement, form.own(values))
            return
        self._execute(connection, form, form.bind(values)).close()

    def run_many(self, connection: Connection, rows: Sequence[_Values]) -> None:
        """Run it once for each of some rows. Raises as ``run`` does."""
        form = self._form(connection)
        if _is_heard(connection) and rows:
            connection.execute(self._statement, [form.own(values) for values in rows])
        elif len(rows) == 1:
            self._execute(connection, form, form.bind(rows[0])).close()
        elif rows:
            bound = [form.bind(row) for row in rows]
            self._execute(connection, form, bound, many=True).close()

    def _form(self, connection: Connection) -> _Form:
        dialect = connection.dialect
        form = self._forms.get(type(dialect))
        if form is None:
            form = self._forms[type(dialect)] = self._compile(dialect)
        return form

    def _compile(self, dialect: Dialect) -> _Form:
        keys = None if self._columns is None else list(self._columns)
        compiled = self._statement.compile(dialect=dialect, column_keys=keys)
        assert isinstance(compiled, SQLCompiler)
        # Where values go by position, one that is used twice is named twice.
        names = compiled.positiontup if compiled.positional else compiled.bind_names.values()
        binds = [(name, compiled.binds[name]) for name in names or ()]
        return _Form(
            sql=str(compiled),
            names=tuple(name for name, _ in binds),
            processors=tuple(
                bind.type.dialect_impl(dialect).bind_processor(dialect) for _, bind in binds
            ),
            constants={name: bind.effective_value for name, bind in binds if not bind.required},
            by_position=compiled.positional,
            results=tuple(
                column.type.dialect_impl(dialect).result_processor(dialect, None)
                for column in self._statement.exported_columns
            ),
        )

    def _execute(
        self, connection: Connection, form: _Form, parameters: Any, *, many: bool = False
    ) -> DBAPICursor:
        cursor = connection.connection.cursor()
        connection.engine.dispatch.before_cursor_execute(
            connection, cursor, form.sql, parameters, None, many
        )
        try:
            if many:
                cursor.executemany(form.sql, parameters)
            else:
                cursor.execute(form.sql, parameters)
        except connection.dialect.loaded_dbapi.Error as error:
            _refuse(connection, cursor, form.sql, parameters, error)
        return cursor


class Query(Prepared, Generic[RowT]):
    """A statement with rows.

    Args:
        statement: What is asked.
        row: A named tuple of its columns, in their order.
        columns: What an insert sets.
    """

    def __init__(
        self, statement: _Statement, row: type[RowT], *, columns: Sequence[str] | None = None
    ) -> None:
        super().__init__(statement, columns=columns)
        told = tuple(column.key for column in statement.exported_columns)
        if told != getattr(row, "_fields", None):
            raise TypeError(f"{row.__name__} does not have the columns {told}.")
        self._row = row

    def all(self, connection: Connection, values: _Values) -> list[RowT]:
        """Return its rows. Raises as ``run`` does."""
        form = self._form(connection)
        if _is_heard(connection):
            told = connection.execute(self._statement, form.own(values))
            return [self._row(*each) for each in told]
        parameters = form.bind(values)
        cursor = self._execute(connection, form, parameters)
        try:
            found = cursor.fetchall()
        except connection.dialect.loaded_dbapi.Error as error:
            _refuse(connection, cursor, form.sql, parameters, error)
        cursor.close()
        return [
            self._row(
                *(
                    value if process is None else process(value)
                    for value, process in zip(each, form.results, strict=True)
                )
            )
            for each in found
        ]

    def first(self, connection: Connection, values: _Values) -> RowT | None:
        """Return its first row, if any. Raises as ``run`` does."""
        return next(iter(self.all(connection, values)), None)


def _is_heard(connection: Connection) -> bool:
    """Return whether somebody listens to statements, as the audit log does."""
    return bool(connection.engine.dispatch.before_execute)


def _refuse(
    connection: Connection, cursor: DBAPICursor, sql: str, parameters: Any, error: Exception
) -> NoReturn:
    """Raise a driver's error as SQLAlchemy would; nothing more runs on a broken connection."""
    dialect, driver = connection.dialect, connection.connection
    is_lost = dialect.is_disconnect(error, driver, cursor)  # type: ignore[arg-type]
    if is_lost or is_undone(driver.dbapi_connection):
        connection.invalidate(error)
    raise DBAPIError.instance(
        sql,
        parameters,
        error,
        dialect.loaded_dbapi.Error,
        dialect=dialect,
        connection_invalidated=is_lost,
    ) from error
