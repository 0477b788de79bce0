"""People who log in with Globus, one by one: who acts for a project without a group, and who is
kept out whatever groups say."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    Connection,
    RowMapping,
    and_,
    delete,
    insert,
    or_,
    select,
    update,
)
from sqlalchemy.exc import IntegrityError

from fabric.auth.groups import DEFAULT_MAX_CONCURRENT, check_allowed, check_project
from fabric.auth.records import BlockedUser, UserRecord
from fabric.auth.rules import raise_version
from fabric.auth.tables import blocked_users, logins, project_users
from fabric.auth.tickets import revoke_issued
from fabric.errors import Duplicate, NotFound, RequestInvalid
from fabric.sql import Database, utc_now

GLOBUS = "globus:"
"""How the id of a login begins, where it stands beside those of keys."""

USERNAME = re.compile(r"[^\s@:]{1,64}@[^\s@:]{1,190}")


class Users:
    """The people of all projects over one database. Thread-safe.

    A person is named as Globus Auth does it: by username, or by the UUID of the identity (also as
    ``globus:UUID``, as runs have it). A running hub notices a change within a second.

    Args:
        database: An open, migrated database.
        clock: The wall clock.
    """

    def __init__(self, database: Database, *, clock: Callable[[], datetime] = utc_now) -> None:
        self._database = database
        self._clock = clock

    # People of a project

    def add(
        self,
        user: str,
        project: str,
        *,
        scopes: Iterable[str] = ("query",),
        max_concurrent: int = DEFAULT_MAX_CONCURRENT,
    ) -> UserRecord:
        """Let a person act for a project, in whatever groups they are.

        Args:
            user: A username, or an identity's UUID.
            project: Who is charged.
            scopes: Some of ``GROUP_SCOPES``.
            max_concurrent: Requests in flight at once.

        Raises:
            Duplicate: The person acts for the project already.
            NotFound: There is no such project.
            RequestInvalid: The name is none, a scope is not a person's, or ``max_concurrent`` is
                not positive, or over a million.
        """
        record = UserRecord(
            user=parse_user(user),
            project=project,
            scopes=frozenset(scopes),
            max_concurrent=max_concurrent,
            created_at=self._clock(),
        )
        check_allowed("person", record.scopes, max_concurrent)
        try:
            with self._database.transaction() as connection:
                check_project(connection, project)
                connection.execute(insert(project_users), _to_row(record))
                raise_version(connection)
        except IntegrityError as error:
            raise Duplicate(kind="user", name=f"{record.user} of {project}") from error
        return record

    def users(self, project: str | None = None) -> list[UserRecord]:
        """Return the people of a project, or of all, in the order they were added."""
        table = project_users
        query = select(table).order_by(table.c.created_at, table.c.user)
        if project is not None:
            query = query.where(table.c.project == project)
        with self._database.read() as connection:
            return [_to_record(row._mapping) for row in connection.execute(query)]

    def user(self, user: str, project: str) -> UserRecord:
        """Return what a person may do in a project.

        Raises:
            NotFound: The person was not added to the project.
            RequestInvalid: The name is none.
        """
        user = parse_user(user)
        with self._database.read() as connection:
            row = connection.execute(select(project_users).where(_is(user, project))).first()
        if row is None:
            raise NotFound(kind="user of the project", name=f"{user} of {project}")
        return _to_record(row._mapping)

    def modify(
        self,
        user: str,
        project: str,
        *,
        scopes: Iterable[str] | None = None,
        max_concurrent: int | None = None,
    ) -> UserRecord:
        """Change what a person may do in a project; ``None`` leaves a field as it is.

        Raises:
            NotFound: The person was not added to the project.
            RequestInvalid: See ``add``.
        """
        with self._database.transaction() as connection:
            old = self.user(user, project)
            new = replace(
                old,
                scopes=old.scopes if scopes is None else frozenset(scopes),
                max_concurrent=old.max_concurrent if max_concurrent is None else max_concurrent,
            )
            check_allowed("person", new.scopes, new.max_concurrent)
            changed = update(project_users).where(_is(old.user, project)).values(_to_row(new))
            connection.execute(changed)
            raise_version(connection)
        return new

    def delete(self, user: str, project: str) -> UserRecord:
        """End what a person was added for; what groups say stays. Return what it was.

        Raises:
            NotFound: The person was not added to the project.
            RequestInvalid: The name is none.
        """
        with self._database.transaction() as connection:
            old = self.user(user, project)
            connection.execute(delete(project_users).where(_is(old.user, project)))
            raise_version(connection)
        return old

    # Who is kept out

    def block(self, user: str, *, reason: str = "") -> BlockedUser:
        """Keep a person out of the hub, whatever groups say, and void their tickets.

        Their batches end; what is in flight goes on.

        Args:
            user: A username, or an identity's UUID.
            reason: What the person is told.

        Raises:
            Duplicate: The person is kept out already.
            RequestInvalid: The name is none.
        """
        blocked = BlockedUser(user=parse_user(user), reason=reason, created_at=self._clock())
        row = {column.name: getattr(blocked, column.name) for column in blocked_users.c}
        try:
            with self._database.transaction() as connection:
                connection.execute(insert(blocked_users), row)
                for name in _aliases(connection, blocked.user):
                    revoke_issued(connection, f"{GLOBUS}{name}", self._clock())
                raise_version(connection)
        except IntegrityError as error:
            raise Duplicate(kind="block of the user", name=blocked.user) from error
        return blocked

    def unblock(self, user: str) -> BlockedUser:
        """Let a person in again, as far as groups and projects say; return what kept them out,
        by whichever name that was.

        Raises:
            NotFound: Nothing does.
            RequestInvalid: The name is none.
        """
        user = parse_user(user)
        with self._database.transaction() as connection:
            theirs = blocked_users.c.user.in_(_aliases(connection, user))
            row = connection.execute(select(blocked_users).where(theirs)).first()
            if row is None:
                raise NotFound(kind="blocked user", name=user)
            connection.execute(delete(blocked_users).where(theirs))
            raise_version(connection)
        return BlockedUser(**row._mapping)

    def blocked(self) -> list[BlockedUser]:
        """Return all who are kept out, in order of name."""
        with self._database.read() as connection:
            rows = connection.execute(select(blocked_users).order_by(blocked_users.c.user))
            return [BlockedUser(**row._mapping) for row in rows]

    # Callers

    def records_of(self, names: Collection[str]) -> list[UserRecord]:
        """Return what somebody was added for who has all these names."""
        query = select(project_users).where(project_users.c.user.in_(sorted(names)))
        with self._database.read() as connection:
            return [_to_record(row._mapping) for row in connection.execute(query)]

    def find_block(self, names: Collection[str]) -> BlockedUser | None:
        """Return what keeps out somebody who has all these names, if anything does.

        An identity that logged in before goes by its username, too.
        """
        known = select(logins.c.name).where(logins.c.id.in_(sorted(names)))
        with self._database.read() as connection:
            everything = sorted({*names, *connection.execute(known).scalars()})
            theirs = blocked_users.c.user.in_(everything)
            row = connection.execute(select(blocked_users).where(theirs)).first()
        return None if row is None else BlockedUser(**row._mapping)

    def note_login(self, identity: str, name: str) -> None:
        """Remember an identity's username: runs, tickets and batches have the UUID alone."""
        this = logins.c.id == identity
        with self._database.read() as connection:
            known = connection.execute(select(logins.c.name).where(this)).scalar()
        if known == name:
            return
        # Another hub may be quicker.
        with suppress(IntegrityError), self._database.transaction() as connection:
            if not connection.execute(update(logins).where(this).values(name=name)).rowcount:
                connection.execute(insert(logins), {"id": identity, "name": name})

    def names(self) -> dict[str, str]:
        """Return the usernames of all who have logged in, by UUID."""
        with self._database.read() as connection:
            return {row.id: row.name for row in connection.execute(select(logins))}


def parse_user(user: str) -> str:
    """Return a username or a UUID as it is stored.

    Raises:
        RequestInvalid: It is neither.
    """
    name = user.removeprefix(GLOBUS).lower()
    if USERNAME.fullmatch(name):
        return name
    try:
        return str(UUID(name))
    except ValueError as error:
        reason = "a user is NAME@DOMAIN, or the UUID of a Globus identity"
        raise RequestInvalid(param="user", value=user, reason=reason) from error


def _aliases(connection: Connection, user: str) -> list[str]:
    """Return a username with the identities that had it, or an identity with its username."""
    same = select(logins).where(or_(logins.c.id == user, logins.c.name == user))
    rows = connection.execute(same).all()
    return sorted({user, *(row.id for row in rows), *(row.name for row in rows)})


def _is(user: str, project: str) -> ColumnElement[bool]:
    return and_(project_users.c.user == user, project_users.c.project == project)


def _to_row(user: UserRecord) -> dict[str, object]:
    row: dict[str, object] = {c.name: getattr(user, c.name) for c in project_users.c}
    return row | {"scopes": " ".join(sorted(user.scopes))}


def _to_record(row: RowMapping) -> UserRecord:
    return UserRecord(**{**row, "scopes": frozenset(str(row["scopes"]).split())})
