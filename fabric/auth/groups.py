"""Which Globus groups belong to which projects."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from datetime import datetime
from uuid import UUID

from sqlalchemy import Connection, RowMapping, delete, insert, select
from sqlalchemy.exc import IntegrityError

from fabric.auth.identity import PROGRAM_SCOPES
from fabric.auth.records import GroupRecord, check_concurrent
from fabric.auth.rules import raise_version
from fabric.auth.tables import project_groups, projects
from fabric.errors import Duplicate, NotFound, RequestInvalid
from fabric.sql import Database, utc_now

GROUP_SCOPES = PROGRAM_SCOPES | {"query", "admin", "launch"}
"""What a group or a person may do. A site's agent is one process with one key, never these."""

DEFAULT_MAX_CONCURRENT = 64


class Groups:
    """The Globus groups of all projects over one database. Thread-safe.

    A group may belong to several projects and a project have several groups. A running hub notices
    a change within a second.

    Args:
        database: An open, migrated database.
        clock: The wall clock.
    """

    def __init__(self, database: Database, *, clock: Callable[[], datetime] = utc_now) -> None:
        self._database = database
        self._clock = clock

    def add(
        self,
        group_id: str,
        project: str,
        *,
        scopes: Iterable[str] = ("query",),
        max_concurrent: int = DEFAULT_MAX_CONCURRENT,
    ) -> GroupRecord:
        """Let the members of a group act for a project.

        Args:
            group_id: The UUID that Globus Groups gave it.
            project: Who is charged.
            scopes: Some of ``GROUP_SCOPES``.
            max_concurrent: Requests in flight at once, for each member.

        Raises:
            Duplicate: The group belongs to the project already.
            NotFound: There is no such project.
            RequestInvalid: The id is not a UUID, a scope is not a group's, or
                ``max_concurrent`` is not positive, or over a million.
        """
        record = GroupRecord(
            group_id=_parse(group_id),
            project=project,
            scopes=frozenset(scopes),
            max_concurrent=max_concurrent,
            created_at=self._clock(),
        )
        check_allowed("group", record.scopes, max_concurrent)
        try:
            with self._database.transaction() as connection:
                check_project(connection, project)
                connection.execute(insert(project_groups), _to_row(record))
                raise_version(connection)
        except IntegrityError as error:
            raise Duplicate(kind="group", name=f"{record.group_id} of {project}") from error
        return record

    def groups(self, project: str | None = None) -> list[GroupRecord]:
        """Return the groups of a project, or of all, in the order they were added."""
        query = select(project_groups).order_by(
            project_groups.c.created_at, project_groups.c.group_id
        )
        if project is not None:
            query = query.where(project_groups.c.project == project)
        with self._database.read() as connection:
            return [_to_record(row._mapping) for row in connection.execute(query)]

    def delete(self, group_id: str, project: str) -> GroupRecord:
        """End what a group's members may do in a project; return what it was.

        Raises:
            NotFound: The group does not belong to the project.
            RequestInvalid: The id is not a UUID.
        """
        group_id = _parse(group_id)
        chosen = (project_groups.c.group_id == group_id, project_groups.c.project == project)
        with self._database.transaction() as connection:
            row = connection.execute(select(project_groups).where(*chosen)).first()
            if row is None:
                raise NotFound(kind="group of the project", name=f"{group_id} of {project}")
            connection.execute(delete(project_groups).where(*chosen))
            raise_version(connection)
        return _to_record(row._mapping)

    def records_of(self, group_ids: Collection[str]) -> list[GroupRecord]:
        """Return what the members of all these groups may do, project by project."""
        query = select(project_groups).where(project_groups.c.group_id.in_(sorted(group_ids)))
        with self._database.read() as connection:
            rows = connection.execute(query.order_by(project_groups.c.group_id))
            return [_to_record(row._mapping) for row in rows]


def _parse(group_id: str) -> str:
    try:
        return str(UUID(group_id))
    except ValueError as error:
        raise RequestInvalid(
            param="group", value=group_id, reason="it is not the UUID of a Globus group"
        ) from error


def check_allowed(who: str, scopes: frozenset[str], max_concurrent: int) -> None:
    """Check what a group or a person is to be allowed.

    Raises:
        RequestInvalid: A scope is not theirs, or so many requests at once are not to be had.
    """
    if unknown := scopes - GROUP_SCOPES:
        reason = f"a {who} may have {', '.join(sorted(GROUP_SCOPES))}"
        raise RequestInvalid(param="scopes", value=sorted(unknown), reason=reason)
    check_concurrent(max_concurrent)


def check_project(connection: Connection, name: str) -> None:
    """Check that there is a project of this name.

    Raises:
        NotFound: There is none.
    """
    if connection.execute(select(projects.c.name).where(projects.c.name == name)).first() is None:
        raise NotFound(kind="project", name=name)


def _to_row(group: GroupRecord) -> dict[str, object]:
    row: dict[str, object] = {c.name: getattr(group, c.name) for c in project_groups.c}
    return row | {"scopes": " ".join(sorted(group.scopes))}


def _to_record(row: RowMapping) -> GroupRecord:
    return GroupRecord(**{**row, "scopes": frozenset(str(row["scopes"]).split())})
