"""Grants, private objects and limits in the database, as administrators change them."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Collection
from dataclasses import replace
from datetime import datetime
from typing import Literal
from uuid import UUID

from sqlalchemy import Connection, delete, insert, or_, select, update
from sqlalchemy.exc import IntegrityError

from fabric.auth.decide import ANY, EVERY_TIER, EVERYTHING, MODES, TIERS, Grant
from fabric.auth.rules import Limit, raise_version, to_grant
from fabric.auth.tables import api_keys, grants, limits, private_objects, projects
from fabric.auth.users import USERNAME
from fabric.errors import Duplicate, NotFound, RequestInvalid
from fabric.messages import MODEL_NAME, SITE_NAME
from fabric.sql import Database, utc_now

Kind = Literal["model", "site"]

MAX_LIMIT = 10**12

_OBJECTS = {
    "model": re.compile(rf"{MODEL_NAME}|\*"),
    "site": re.compile(rf"{SITE_NAME}|\*"),
}
_LIMIT_FIELDS = ("requests_per_min", "tokens_per_min", "max_concurrent")


class Grants:
    """Who may use what is private, and how much of everything. Thread-safe.

    All hubs of the database act by a change within a second.

    Args:
        database: An open, migrated database.
        clock: The wall clock.
    """

    def __init__(self, database: Database, *, clock: Callable[[], datetime] = utc_now) -> None:
        self._database = database
        self._clock = clock

    # Grants

    def add(
        self,
        subject: str,
        *,
        model: str | None = None,
        site: str | None = None,
        modes: Collection[str] = EVERYTHING,
        tiers: Collection[str] = EVERY_TIER,
    ) -> Grant:
        """Grant something; the object becomes private, if it was not yet.

        That is the model, if one is named, else the site.

        Args:
            subject: Whose it is; see ``Grant``.
            model: See ``Grant``, as for the others.
            site: At least one of model and site is given.
            modes: Some of ``MODES``.
            tiers: Some of ``TIERS``.

        Raises:
            Duplicate: The subject has a grant of the same model and site.
            NotFound: There is no such project or key.
            RequestInvalid: A name is not one, or a mode or tier is unknown.
        """
        if model is None and site is None:
            reason = "a grant is of a model, of a site, or of both"
            raise RequestInvalid(param="model", value=None, reason=reason)
        for kind, name in (("model", model), ("site", site)):
            if name is not None:
                _check_name(kind, name)
        grant = Grant(
            id=secrets.token_hex(6),
            subject=_parse(subject, ("project", "key", "user", "group")),
            model=model,
            site=site,
            modes=_some("modes", modes, MODES),
            tiers=_some("tiers", tiers, TIERS),
        )
        try:
            with self._database.transaction() as connection:
                _check_subject(connection, grant.subject)
                connection.execute(insert(grants), _to_row(grant) | {"created_at": self._clock()})
                if model is None and site is not None:
                    self._close(connection, "site", site)
                elif model is not None:
                    self._close(connection, "model", model)
                raise_version(connection)
        except IntegrityError as error:
            raise Duplicate(kind="grant", name=_describe(grant)) from error
        return grant

    def grant(self, grant_id: str) -> Grant:
        """Return a grant.

        Raises:
            NotFound: There is none of this id.
        """
        with self._database.read() as connection:
            row = connection.execute(select(grants).where(grants.c.id == grant_id)).first()
        if row is None:
            raise NotFound(kind="grant", name=grant_id)
        return to_grant(row._mapping)

    def grants(
        self, *, subject: str | None = None, model: str | None = None, site: str | None = None
    ) -> list[Grant]:
        """Return all grants, or those of a subject, of a model or of a site, oldest first."""
        query = select(grants).order_by(grants.c.created_at, grants.c.id)
        for column, value in ((grants.c.subject, subject), (grants.c.model, model)):
            query = query if value is None else query.where(column == value)
        if site is not None:
            query = query.where(grants.c.site == site)
        with self._database.read() as connection:
            return [to_grant(row._mapping) for row in connection.execute(query)]

    def modify(
        self,
        grant_id: str,
        *,
        modes: Collection[str] | None = None,
        tiers: Collection[str] | None = None,
    ) -> Grant:
        """Change what a grant allows; ``None`` leaves a field as it is.

        Raises:
            NotFound: There is none of this id.
            RequestInvalid: A mode or tier is unknown.
        """
        with self._database.transaction() as connection:
            old = self.grant(grant_id)
            new = replace(
                old,
                modes=old.modes if modes is None else _some("modes", modes, MODES),
                tiers=old.tiers if tiers is None else _some("tiers", tiers, TIERS),
            )
            connection.execute(update(grants).where(grants.c.id == grant_id).values(_to_row(new)))
            raise_version(connection)
        return new

    def delete(self, grant_id: str) -> Grant:
        """Take a grant back; what it was of stays private. Return what it was.

        Raises:
            NotFound: There is none of this id.
        """
        with self._database.transaction() as connection:
            old = self.grant(grant_id)
            connection.execute(delete(grants).where(grants.c.id == grant_id))
            raise_version(connection)
        return old

    # Private objects

    def private(self) -> list[tuple[Kind, str]]:
        """Return the kinds and names of what is private."""
        table = private_objects
        with self._database.read() as connection:
            rows = connection.execute(select(table).order_by(table.c.kind, table.c.name))
            return [(row.kind, row.name) for row in rows]

    def close(self, kind: Kind, name: str) -> None:
        """Make a model or a site private: nobody may use it without a grant.

        Raises:
            RequestInvalid: It is not a name.
        """
        _check_name(kind, name)
        with self._database.transaction() as connection:
            self._close(connection, kind, name)
            raise_version(connection)

    def open(self, kind: Kind, name: str) -> None:
        """Make a private model or site public again; its grants stay on record.

        Raises:
            NotFound: It is not private.
        """
        table = private_objects
        with self._database.transaction() as connection:
            this = (table.c.kind == kind, table.c.name == name)
            if not connection.execute(delete(table).where(*this)).rowcount:
                raise NotFound(kind=f"private {kind}", name=name)
            raise_version(connection)

    def _close(self, connection: Connection, kind: Kind, name: str) -> None:
        table = private_objects
        this = (table.c.kind == kind, table.c.name == name)
        if name == ANY or connection.execute(select(table).where(*this)).first() is not None:
            return
        row = {"kind": kind, "name": name, "created_at": self._clock()}
        connection.execute(insert(table), row)

    # Limits

    def set_limit(
        self,
        subject: str,
        *,
        requests_per_min: int | None = None,
        tokens_per_min: int | None = None,
        max_concurrent: int | None = None,
    ) -> Limit:
        """Limit a subject, in place of the limit it had.

        Args:
            subject: See ``Limit``, as for the others.
            requests_per_min: ``None`` leaves it open, as for the others.
            tokens_per_min: At most ``MAX_LIMIT``, as the others.
            max_concurrent: Holds beside the key's own.

        Raises:
            NotFound: There is no such project or key.
            RequestInvalid: A value is not positive, or none is given.
        """
        values = dict(
            zip(_LIMIT_FIELDS, (requests_per_min, tokens_per_min, max_concurrent), strict=True)
        )
        for name, value in values.items():
            if value is not None and not 0 < value <= MAX_LIMIT:
                reason = f"it is between 1 and {MAX_LIMIT}"
                raise RequestInvalid(param=name, value=value, reason=reason)
        if set(values.values()) == {None}:
            reason = f"say at least one of {', '.join(_LIMIT_FIELDS)}, or delete the limit"
            raise RequestInvalid(param="limit", value=None, reason=reason)
        subject = _parse(subject, ("project", "key", "user"), every=True)
        with self._database.transaction() as connection:
            _check_subject(connection, subject)
            changed = update(limits).where(limits.c.subject == subject).values(values)
            if not connection.execute(changed).rowcount:
                row = {"subject": subject, "created_at": self._clock()} | values
                connection.execute(insert(limits), row)
            raise_version(connection)
        return Limit(subject=subject, **values)

    def limits(self, subject: str | None = None) -> list[Limit]:
        """Return all limits, or a subject's, in order of subject."""
        query = select(limits.c.subject, *(limits.c[name] for name in _LIMIT_FIELDS))
        if subject is not None:
            query = query.where(limits.c.subject == subject)
        with self._database.read() as connection:
            rows = connection.execute(query.order_by(limits.c.subject))
            return [Limit(**row._mapping) for row in rows]

    def delete_limit(self, subject: str) -> Limit:
        """Take a limit away; return what it was.

        Raises:
            NotFound: The subject has none.
        """
        with self._database.transaction() as connection:
            if not (found := self.limits(subject)):
                raise NotFound(kind="limit", name=subject)
            connection.execute(delete(limits).where(limits.c.subject == subject))
            raise_version(connection)
        return found[0]


def forget_project(connection: Connection, project: str) -> None:
    """Take from a project and its keys what they were granted, as part of the project's deletion:
    another project of this name begins with nothing."""
    keys = select("key:" + api_keys.c.id).where(api_keys.c.project == project)
    for table in (grants, limits):
        theirs = or_(table.c.subject == f"project:{project}", table.c.subject.in_(keys))
        connection.execute(delete(table).where(theirs))
    raise_version(connection)


def _parse(subject: str, kinds: Collection[str], *, every: bool = False) -> str:
    """Return a subject as it is stored.

    Raises:
        RequestInvalid: It is not one.
    """
    kind, _, name = subject.partition(":")
    if subject == ANY and not every:
        return subject
    if kind in kinds and name == ANY and every:
        return subject
    if kind in kinds and name not in ("", ANY):
        if kind == "user":
            name = name.lower()
        if kind in ("project", "key") or (kind == "user" and USERNAME.fullmatch(name)):
            return f"{kind}:{name}"
        try:
            return f"{kind}:{UUID(name)}"
        except ValueError:
            pass
    forms = [f"{one}:{_FORMS[one]}" for one in kinds]
    forms += [f"{one}:{ANY}" for one in kinds] if every else [ANY]
    raise RequestInvalid(param="subject", value=subject, reason=f"it is one of {', '.join(forms)}")


_FORMS = {"project": "NAME", "key": "ID", "user": "NAME@DOMAIN or UUID", "group": "UUID"}


def _check_subject(connection: Connection, subject: str) -> None:
    kind, _, name = subject.partition(":")
    column = {"project": projects.c.name, "key": api_keys.c.id}.get(kind)
    if column is None or name == ANY:
        return
    if connection.execute(select(column).where(column == name)).first() is None:
        raise NotFound(kind=kind, name=name)


def _check_name(kind: str, name: str) -> None:
    if not _OBJECTS[kind].fullmatch(name):
        reason = f"it is the name of a {kind} without a revision, or {ANY} for all that are private"
        raise RequestInvalid(param=kind, value=name, reason=reason)


def _some(param: str, values: Collection[str], known: Collection[str]) -> frozenset[str]:
    unknown = set(values) - set(known)
    if unknown or not values:
        reason = f"say some of {', '.join(known)}"
        raise RequestInvalid(param=param, value=sorted(unknown), reason=reason)
    return frozenset(values)


def _describe(grant: Grant) -> str:
    what = [f"{kind} {name}" for kind in ("model", "site") if (name := getattr(grant, kind))]
    return f"of {' at '.join(what)} to {grant.subject}"


def _to_row(grant: Grant) -> dict[str, object]:
    return {
        "id": grant.id,
        "subject": grant.subject,
        "model": grant.model or "",
        "site": grant.site or "",
        "modes": " ".join(sorted(grant.modes)),
        "tiers": " ".join(sorted(grant.tiers)),
    }
