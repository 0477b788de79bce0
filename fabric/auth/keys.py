"""Projects and API keys: made once, shown once, checked at every request."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import string
import threading
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from datetime import datetime

from sqlalchemy import Connection, RowMapping, bindparam, delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from fabric.auth.grants import forget_project
from fabric.auth.identity import SCOPES, Identity
from fabric.auth.records import KeyRecord, ProjectRecord, check_concurrent
from fabric.auth.rules import raise_version
from fabric.auth.tables import api_keys, project_sites, projects
from fabric.auth.tickets import Tickets, revoke_issued
from fabric.errors import (
    Duplicate,
    KeyExpired,
    KeyInvalid,
    KeyMissing,
    NotFound,
    RequestInvalid,
)
from fabric.messages import SITE_NAME
from fabric.sql import Database, utc_now

CACHE_S = 60.0
"""How long an identity is believed without asking the database, where nobody calls ``forget``."""

DEFAULT_MAX_CONCURRENT = 64

_CACHE_ENTRIES = 4096
_KEY = re.compile(r"fab_([0-9a-f]{12})_[0-9A-Za-z]{43}")
_PROJECT = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_ALPHABET = string.ascii_letters + string.digits
_FIELDS = [column for column in api_keys.c if column is not api_keys.c.secret_sha256]
_BY_ID = select(api_keys).where(api_keys.c.id == bindparam("key"))


@dataclass(frozen=True, slots=True)
class _Known:
    identity: Identity
    expires_at: datetime | None
    asked_at_s: float


class Keys:
    """Projects and their API keys over one database.

    A key reads ``fab_<id>_<secret>``; the id names it in lists and logs, and the database holds a
    SHA-256 of the whole. ``tickets`` are what stands for a key at a site. Thread-safe.

    Args:
        database: An open, migrated database.
        clock: The wall clock, for expiry.
        monotonic: Seconds that only grow, for the cache.
    """

    def __init__(
        self,
        database: Database,
        *,
        clock: Callable[[], datetime] = utc_now,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database = database
        self._clock = clock
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._known: dict[str, _Known] = {}
        self._num_changes = 0
        self.tickets = Tickets(database, clock=clock)

    # Projects

    def add_project(
        self, name: str, *, title: str = "", sites: Collection[str] = ()
    ) -> ProjectRecord:
        """Create a project.

        Args:
            name: Its name.
            title: What people read.
            sites: Where alone its requests may run; anywhere if none is named.

        Raises:
            Duplicate: There is one of this name.
            RequestInvalid: The name is not of lower-case letters, digits and hyphens, or what is
                said to be a site cannot be one.
        """
        if not _PROJECT.fullmatch(name):
            raise RequestInvalid(
                param="project",
                value=name,
                reason="a name is 1 to 63 lower-case letters, digits and hyphens",
            )
        project = ProjectRecord(
            name=name, title=title, created_at=self._clock(), sites=tuple(sorted(set(sites)))
        )
        row = {"name": name, "title": title, "created_at": project.created_at}
        try:
            with self._database.transaction() as connection:
                connection.execute(insert(projects), row)
                if sites:
                    _keep_at(connection, name, project.sites)
        except IntegrityError as error:
            raise Duplicate(kind="project", name=name) from error
        return project

    def project(self, name: str) -> ProjectRecord:
        """Return a project.

        Raises:
            NotFound: There is none of this name.
        """
        with self._database.read() as connection:
            row = connection.execute(select(projects).where(projects.c.name == name)).first()
            if row is None:
                raise NotFound(kind="project", name=name)
            return ProjectRecord(**row._mapping, sites=_homes(connection).get(name, ()))

    def projects(self) -> list[ProjectRecord]:
        """Return all projects, in order of name."""
        with self._database.read() as connection:
            homes = _homes(connection)
            rows = connection.execute(select(projects).order_by(projects.c.name))
            return [ProjectRecord(**row._mapping, sites=homes.get(row.name, ())) for row in rows]

    def modify_project(
        self, name: str, *, title: str | None = None, sites: Collection[str] | None = None
    ) -> ProjectRecord:
        """Change a project; ``None`` leaves a field as it is. Hubs act by it within a second.

        Args:
            name: Which.
            title: What people read.
            sites: Where alone its requests may run; anywhere if it is empty.

        Raises:
            NotFound: There is none of this name.
            RequestInvalid: What is said to be a site cannot be one.
        """
        with self._database.transaction() as connection:
            old = self.project(name)
            if title is not None:
                changed = update(projects).where(projects.c.name == name)
                connection.execute(changed.values(title=title))
            if sites is not None and set(sites) != set(old.sites):
                _keep_at(connection, name, sites)
            return self.project(name)

    def delete_project(self, name: str) -> None:
        """Forget a project with its keys, grants and limits; its allocations, charges and runs stay
        on record.

        Raises:
            NotFound: There is none of this name.
        """
        with self._database.transaction() as connection:
            forget_project(connection, name)
            if not connection.execute(delete(projects).where(projects.c.name == name)).rowcount:
                raise NotFound(kind="project", name=name)
        self.forget()

    # Keys

    def add_key(
        self,
        project: str,
        *,
        label: str = "",
        scopes: Iterable[str] = ("query",),
        site: str | None = None,
        max_concurrent: int = DEFAULT_MAX_CONCURRENT,
        expires_at: datetime | None = None,
    ) -> tuple[KeyRecord, str]:
        """Create a key; return its record and the key itself, shown only here.

        Args:
            project: Whose it is.
            label: What its owner calls it.
            scopes: Some of ``SCOPES``.
            site: The site a key with scope ``site`` is bound to, and only for such a key.
            max_concurrent: Requests in flight at once.
            expires_at: When it ends; never by default.

        Raises:
            NotFound: There is no such project.
            RequestInvalid: A scope is unknown, site and scope do not go together, or
                ``max_concurrent`` is not positive, or over a million.
        """
        key_id = secrets.token_hex(6)
        key = f"fab_{key_id}_{''.join(secrets.choice(_ALPHABET) for _ in range(43))}"
        record = KeyRecord(
            id=key_id,
            project=self.project(project).name,
            label=label,
            scopes=frozenset(scopes),
            site=site,
            max_concurrent=max_concurrent,
            created_at=self._clock(),
            expires_at=expires_at,
            revoked_at=None,
        )
        _check(record)
        with self._database.transaction() as connection:
            connection.execute(insert(api_keys), _to_row(record) | {"secret_sha256": _sha256(key)})
        return record, key

    def key(self, key_id: str) -> KeyRecord:
        """Return a key.

        Raises:
            NotFound: There is none of this id.
        """
        with self._database.read() as connection:
            return _get(connection, key_id)

    def keys(self, project: str | None = None) -> list[KeyRecord]:
        """Return the keys of a project, or all, in the order they were made."""
        query = select(*_FIELDS).order_by(api_keys.c.created_at, api_keys.c.id)
        if project is not None:
            query = query.where(api_keys.c.project == project)
        with self._database.read() as connection:
            return [_to_record(row._mapping) for row in connection.execute(query)]

    def modify(
        self,
        key_id: str,
        *,
        label: str | None = None,
        scopes: Iterable[str] | None = None,
        max_concurrent: int | None = None,
        expires_at: datetime | None = None,
    ) -> KeyRecord:
        """Change a key; ``None`` leaves a field as it is.

        Raises:
            NotFound: There is none of this id.
            RequestInvalid: See ``add_key``.
        """
        with self._database.transaction() as connection:
            old = _get(connection, key_id)
            new = replace(
                old,
                label=old.label if label is None else label,
                scopes=old.scopes if scopes is None else frozenset(scopes),
                max_concurrent=old.max_concurrent if max_concurrent is None else max_concurrent,
                expires_at=expires_at or old.expires_at,
            )
            _check(new)
            connection.execute(update(api_keys).where(api_keys.c.id == key_id).values(_to_row(new)))
            raise_version(connection)
        self.forget()
        return new

    def revoke(self, key_id: str) -> KeyRecord:
        """End a key for good, and its tickets: at once in this process, within a second in hubs.

        Raises:
            NotFound: There is none of this id.
        """
        with self._database.transaction() as connection:
            connection.execute(
                update(api_keys)
                .where(api_keys.c.id == key_id, api_keys.c.revoked_at.is_(None))
                .values(revoked_at=self._clock())
            )
            revoke_issued(connection, key_id, self._clock())
            record = _get(connection, key_id)
            raise_version(connection)
        self.forget()
        return record

    # Callers

    def authenticate(self, bearer: str | None) -> Identity:
        """Return whose key this is.

        Args:
            bearer: The key, as it follows ``Bearer`` in the header.

        Raises:
            KeyMissing: There is none.
            KeyInvalid: It is not a key, unknown or revoked.
            KeyExpired: Its time is over.
        """
        if not bearer:
            raise KeyMissing
        match = _KEY.fullmatch(bearer)
        if match is None:
            raise KeyInvalid
        digest = _sha256(bearer)
        known = self._recall(digest)
        if known is None:
            known = self._ask(match[1], digest)
        if known.expires_at is not None and known.expires_at <= self._clock():
            raise KeyExpired(expired_at=known.expires_at.isoformat())
        return known.identity

    def recall(self, bearer: str) -> Identity | None:
        """Return whose key this is if that is known without the database, else ``None``.

        For callers on an event loop: what it does not know, ``authenticate`` finds out.
        """
        known = self._recall(_sha256(bearer))
        if known is None or (known.expires_at is not None and known.expires_at <= self._clock()):
            return None
        return known.identity

    def _recall(self, digest: str) -> _Known | None:
        with self._lock:
            known = self._known.get(digest)
            if known is not None and self._monotonic() - known.asked_at_s >= CACHE_S:
                del self._known[digest]
                return None
            return known

    def _ask(self, key_id: str, digest: str) -> _Known:
        num_changes = self._num_changes
        with self._database.read() as connection:
            row = connection.execute(_BY_ID, {"key": key_id}).first()
        stored = row.secret_sha256 if row is not None else ""
        if not hmac.compare_digest(stored, digest) or row is None or row.revoked_at is not None:
            raise KeyInvalid
        identity = Identity(
            key_id=row.id,
            project=row.project,
            scopes=frozenset(row.scopes.split()),
            max_concurrent=row.max_concurrent,
            site=row.site,
            expires_at=row.expires_at,
        )
        known = _Known(identity, row.expires_at, self._monotonic())
        with self._lock:
            # What was read before a key was revoked must not be believed after it.
            if num_changes == self._num_changes:
                if len(self._known) >= _CACHE_ENTRIES:
                    self._known.clear()
                self._known[digest] = known
        return known

    def forget(self) -> None:
        """Ask the database about every key anew, because one of them may have changed."""
        with self._lock:
            self._num_changes += 1
            self._known.clear()


def _keep_at(connection: Connection, project: str, sites: Collection[str]) -> None:
    """Let a project's requests run at these sites alone, or anywhere if there are none."""
    for site in sites:
        if not re.fullmatch(SITE_NAME, site):
            reason = "it is no site's name: 1 to 63 lower-case letters, digits and hyphens"
            raise RequestInvalid(param="sites", value=site, reason=reason)
    connection.execute(delete(project_sites).where(project_sites.c.project == project))
    if sites:
        rows = [{"project": project, "site": site} for site in sorted(set(sites))]
        connection.execute(insert(project_sites), rows)
    raise_version(connection)


def _homes(connection: Connection) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for row in connection.execute(select(project_sites).order_by(project_sites.c.site)):
        found[row.project] = (*found.get(row.project, ()), row.site)
    return found


def _sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _get(connection: Connection, key_id: str) -> KeyRecord:
    row = connection.execute(select(*_FIELDS).where(api_keys.c.id == key_id)).first()
    if row is None:
        raise NotFound(kind="key", name=key_id)
    return _to_record(row._mapping)


def _check(key: KeyRecord) -> None:
    if unknown := key.scopes - SCOPES:
        raise RequestInvalid(
            param="scopes", value=sorted(unknown), reason=f"there are {', '.join(sorted(SCOPES))}"
        )
    if ("site" in key.scopes) != (key.site is not None):
        raise RequestInvalid(
            param="site", value=key.site, reason="a key has a site if it has the scope 'site'"
        )
    check_concurrent(key.max_concurrent)


def _to_row(key: KeyRecord) -> dict[str, object]:
    row: dict[str, object] = {column.name: getattr(key, column.name) for column in _FIELDS}
    return row | {"scopes": " ".join(sorted(key.scopes))}


def _to_record(row: RowMapping) -> KeyRecord:
    return KeyRecord(**{**row, "scopes": frozenset(str(row["scopes"]).split())})
