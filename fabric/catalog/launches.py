"""Records of launches: which instance may join, and the proof of it."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from datetime import datetime, timedelta

from sqlalchemy import Connection, RowMapping, bindparam, insert, select, update

from fabric.catalog import models, sites
from fabric.catalog.records import LaunchRecord
from fabric.catalog.tables import launches
from fabric.errors import KeyExpired, KeyInvalid, NotFound
from fabric.messages import InstanceState, new_id

_FIELDS = [column for column in launches.c if column is not launches.c.token_sha256]
_BY_TOKEN = select(*_FIELDS).where(launches.c.token_sha256 == bindparam("token_hash"))
_BY_INSTANCE = select(*_FIELDS).where(launches.c.instance == bindparam("id"))


def add(
    connection: Connection, site: str, model: str, lifetime_s: float, now: datetime
) -> tuple[LaunchRecord, str]:
    """Permit one instance to join. See ``Catalog.add_launch``."""
    version = models.resolve(connection, model)
    launch = LaunchRecord(
        instance=new_id("inst"),
        site=sites.get(connection, site).name,
        model=version.ref,
        digest=version.digest,
        state=InstanceState.PENDING,
        created_at=now,
        expires_at=now + timedelta(seconds=lifetime_s),
    )
    token = f"fabl_{secrets.token_urlsafe(32)}"
    row = {column.name: getattr(launch, column.name) for column in _FIELDS}
    connection.execute(insert(launches), row | {"token_sha256": _sha256(token)})
    return launch, token


def authenticate(connection: Connection, token: str | None, now: datetime) -> LaunchRecord:
    """Return the launch a token belongs to. See ``Catalog.authenticate_launch``."""
    # Looking a hash up tells an attacker's clock nothing about the token: he cannot choose it.
    row = connection.execute(_BY_TOKEN, {"token_hash": _sha256(token or "")}).first()
    if row is None or row.ended_at is not None:
        raise KeyInvalid
    if row.expires_at <= now:
        raise KeyExpired(expired_at=row.expires_at.isoformat())
    return _to_launch(row._mapping)


def get(connection: Connection, instance: str, *, site: str | None) -> LaunchRecord:
    """Return a launch. See ``Catalog.launch``."""
    row = connection.execute(_BY_INSTANCE, {"id": instance}).first()
    if row is None or site not in (None, row.site):
        raise NotFound(kind="instance", name=instance)
    return _to_launch(row._mapping)


def listed(connection: Connection, *, site: str | None, ended: bool) -> list[LaunchRecord]:
    """Return launches, newest first. See ``Catalog.launches``."""
    query = select(*_FIELDS).order_by(launches.c.created_at.desc(), launches.c.instance)
    if site is not None:
        query = query.where(launches.c.site == site)
    if not ended:
        query = query.where(launches.c.ended_at.is_(None))
    return [_to_launch(row._mapping) for row in connection.execute(query)]


def change(
    connection: Connection, instance: str, changes: Mapping[str, object], *, site: str | None
) -> LaunchRecord:
    """Change a launch that has not ended; one that has stays as it is."""
    get(connection, instance, site=site)
    connection.execute(
        update(launches)
        .where(launches.c.instance == instance, launches.c.ended_at.is_(None))
        .values(**changes)
    )
    return get(connection, instance, site=site)


def _sha256(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _to_launch(row: RowMapping) -> LaunchRecord:
    return LaunchRecord(**{**row, "state": InstanceState(row["state"])})
