"""Records of functions registered with Globus Compute."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Connection, bindparam, insert, or_, select, update
from sqlalchemy.exc import IntegrityError

from fabric.catalog.records import FunctionRecord
from fabric.catalog.tables import functions
from fabric.errors import Duplicate, NotFound

_BY_ID = select(functions).where(functions.c.id == bindparam("function"))
_ORDER = (functions.c.created_at.desc(), functions.c.id)


def add(connection: Connection, function: FunctionRecord) -> None:
    """Store a function. See ``Catalog.add_function``."""
    row = {column.name: getattr(function, column.name) for column in functions.c}
    try:
        connection.execute(insert(functions), row)
    except IntegrityError as error:
        raise Duplicate(kind="function", name=function.id) from error


def get(connection: Connection, id: str) -> FunctionRecord:
    """Return a function. See ``Catalog.function``."""
    row = connection.execute(_BY_ID, {"function": id}).first()
    if row is None:
        raise NotFound(kind="function", name=id)
    return FunctionRecord(**row._mapping)


def listed(connection: Connection, name: str | None, *, retired: bool) -> list[FunctionRecord]:
    """Return functions. See ``Catalog.functions``."""
    query = select(functions).order_by(functions.c.name, *_ORDER)
    if name is not None:
        query = query.where(functions.c.name == name)
    if not retired:
        query = query.where(functions.c.retired_at.is_(None))
    return [FunctionRecord(**row._mapping) for row in connection.execute(query)]


def newest(connection: Connection, name: str, endpoint_id: str | None) -> FunctionRecord:
    """Return what to call. See ``Catalog.function_for``."""
    everywhere = functions.c.endpoint_id.is_(None)
    query = (
        select(functions)
        .where(
            functions.c.name == name,
            functions.c.retired_at.is_(None),
            or_(everywhere, functions.c.endpoint_id == endpoint_id),
        )
        .order_by(everywhere, *_ORDER)
        .limit(1)
    )
    row = connection.execute(query).first()
    if row is None:
        raise NotFound(kind="function", name=name)
    return FunctionRecord(**row._mapping)


def retire(connection: Connection, id: str, now: datetime) -> FunctionRecord:
    """Note that a function is registered no more. See ``Catalog.retire_function``."""
    connection.execute(
        update(functions)
        .where(functions.c.id == id, functions.c.retired_at.is_(None))
        .values(retired_at=now)
    )
    return get(connection, id)
