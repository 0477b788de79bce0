"""Records of model versions, and how a reference finds one."""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import ColumnElement, Connection, bindparam, delete, insert, or_, select, update
from sqlalchemy.exc import IntegrityError

from fabric.catalog.records import ModelVersion
from fabric.catalog.tables import models
from fabric.errors import DigestMismatch, Duplicate, RequestInvalid, UnknownModel

_FIELDS = [column for column in models.c if column is not models.c.id]
_NEWEST = (
    select(*_FIELDS)
    .where(models.c.name == bindparam("model"))
    .order_by(models.c.id.desc())
    .limit(1)
)
_VERSION = _NEWEST.where(
    or_(models.c.revision == bindparam("version"), models.c.digest == bindparam("version"))
)


def add(connection: Connection, model: ModelVersion) -> None:
    """Store a new version. See ``Catalog.add_model``."""
    row = {column.name: getattr(model, column.name) for column in _FIELDS}
    try:
        connection.execute(insert(models), row)
    except IntegrityError as error:
        raise Duplicate(kind="model", name=model.ref) from error


def resolve(connection: Connection, ref: str) -> ModelVersion:
    """Return the version a reference names. See ``Catalog.resolve``."""
    name, _, version = ref.partition("@")
    row = connection.execute(
        _VERSION if version else _NEWEST, {"model": name, "version": version}
    ).first()
    if row is None:
        raise UnknownModel(model=ref, known=[model.ref for model in listed(connection)])
    return ModelVersion(**row._mapping)


def listed(connection: Connection) -> list[ModelVersion]:
    """Return all versions: by name, the newest of each first."""
    rows = connection.execute(select(*_FIELDS).order_by(models.c.name, models.c.id.desc()))
    return [ModelVersion(**row._mapping) for row in rows]


def modify(connection: Connection, ref: str, changes: Mapping[str, object]) -> ModelVersion:
    """Change a version's fields. See ``Catalog.modify_model``."""
    model = resolve(connection, ref)
    if changes:
        connection.execute(update(models).where(_is(model)).values(**changes))
    return resolve(connection, model.ref)


def remove(connection: Connection, ref: str) -> ModelVersion:
    """Forget one version. See ``Catalog.delete_model``."""
    model = resolve(connection, ref)
    others = [other.ref for other in listed(connection) if other.name == model.name]
    if "@" not in ref and len(others) > 1:
        raise RequestInvalid(
            param="model", value=ref, reason=f"it has several versions, say which: {others}"
        )
    connection.execute(delete(models).where(_is(model)))
    return model


def register_digest(connection: Connection, ref: str, digest: str) -> ModelVersion:
    """Fix or check a version's digest. See ``Catalog.register_digest``."""
    model = resolve(connection, ref)
    connection.execute(
        update(models).where(_is(model), models.c.digest.is_(None)).values(digest=digest)
    )
    fixed = resolve(connection, model.ref)
    if fixed.digest != digest:
        raise DigestMismatch(name=model.ref, expected=str(fixed.digest), actual=digest)
    return fixed


def _is(model: ModelVersion) -> ColumnElement[bool]:
    return (models.c.name == model.name) & (models.c.revision == model.revision)
