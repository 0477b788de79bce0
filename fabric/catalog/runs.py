"""Records of runs."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import Connection, RowMapping, Select, bindparam, func, select
from sqlalchemy.dialects import postgresql, sqlite

from fabric.catalog.records import RunRecord, UsageSum, UserSum
from fabric.catalog.tables import runs
from fabric.errors import NotFound
from fabric.messages import Placement, RunState, Usage
from fabric.sql import Prepared

_USAGE = frozenset(Usage.model_fields).intersection(runs.c.keys())
"""What is recorded of a usage."""
_DIRECT = [c.name for c in runs.c if c.name not in _USAGE | {"placement", "state"}]
_BY_ID = select(runs).where(runs.c.id == bindparam("run"))


def _upsert(new: sqlite.Insert | postgresql.Insert) -> sqlite.Insert | postgresql.Insert:
    values = {column.name: new.excluded[column.name] for column in runs.c if column.name != "id"}
    return new.on_conflict_do_update(
        index_elements=["id"], set_=values, where=runs.c.project == new.excluded.project
    )


_UPSERT = {
    "sqlite": Prepared(_upsert(sqlite.insert(runs))),
    "postgresql": Prepared(_upsert(postgresql.insert(runs))),
}


def record(connection: Connection, records: Sequence[RunRecord]) -> None:
    """Store runs as they are now. See ``Catalog.record_runs``."""
    rows = [_to_row(run) for run in records]
    _UPSERT[connection.dialect.name].run_many(connection, rows)


def get(connection: Connection, run: str, *, project: str | None) -> RunRecord:
    """Return a run. See ``Catalog.run``."""
    row = connection.execute(_BY_ID, {"run": run}).first()
    if row is None or project not in (None, row.project):
        raise NotFound(kind="run", name=run)
    return _to_run(row._mapping)


def listed(
    connection: Connection,
    project: str | None,
    *,
    since: datetime | None,
    until: datetime | None,
    limit: int,
    **equal: str | None,
) -> list[RunRecord]:
    """Return runs, newest first. See ``Catalog.runs``."""
    query = _period(select(runs), project, since, until)
    for name, value in equal.items():
        if value is not None:
            query = query.where(runs.c[name] == value)
    query = query.order_by(runs.c.created_at.desc(), runs.c.id).limit(limit)
    return [_to_run(row._mapping) for row in connection.execute(query)]


def usage(
    connection: Connection,
    project: str | None,
    *,
    since: datetime | None,
    until: datetime | None,
) -> list[UsageSum]:
    """Return sums by model and site. See ``Catalog.usage``."""
    summed = ("prompt_tokens", "cached_prompt_tokens", "output_tokens", "device_s", "charge_usu")
    query = _period(
        select(
            runs.c.model,
            runs.c.site,
            func.count().label("num_runs"),
            *(func.sum(runs.c[name]).label(name) for name in summed),
        ),
        project,
        since,
        until,
    )
    query = query.group_by(runs.c.model, runs.c.site).order_by(runs.c.model, runs.c.site)
    whole = [name for name in summed if name != "device_s"]
    return [
        UsageSum(**{**row._mapping, **{name: int(row._mapping[name]) for name in whole}})
        for row in connection.execute(query)
    ]


def users(connection: Connection, project: str | None, *, since: datetime | None) -> list[UserSum]:
    """Return who asked, and how much. See ``Catalog.users``."""
    query = select(
        runs.c.key_id,
        runs.c.project,
        func.count().label("num_runs"),
        func.sum(runs.c.charge_usu).label("charge_usu"),
        func.max(runs.c.created_at).label("last_at"),
    )
    query = _period(query, project, since, None).group_by(runs.c.key_id, runs.c.project)
    found = [
        UserSum(**{**row._mapping, "charge_usu": int(row.charge_usu)})
        for row in connection.execute(query)
    ]
    return sorted(found, key=lambda user: user.last_at, reverse=True)


def _period(
    query: Select[tuple[object, ...]],
    project: str | None,
    since: datetime | None,
    until: datetime | None,
) -> Select[tuple[object, ...]]:
    if project is not None:
        query = query.where(runs.c.project == project)
    if since is not None:
        query = query.where(runs.c.created_at >= since)
    if until is not None:
        query = query.where(runs.c.created_at < until)
    return query


def _to_row(run: RunRecord) -> dict[str, object]:
    row: dict[str, object] = {name: getattr(run, name) for name in _DIRECT}
    row |= {name: getattr(run.usage, name) for name in _USAGE}
    row["state"] = run.state.value
    row["placement"] = run.placement and run.placement.model_dump_json()
    return row


def _to_run(row: RowMapping) -> RunRecord:
    fields = {name: row[name] for name in _DIRECT}
    placement = row["placement"]
    return RunRecord(
        **fields,
        state=RunState(row["state"]),
        usage=Usage.model_validate({name: row[name] for name in _USAGE}),
        placement=None if placement is None else Placement.model_validate_json(str(placement)),
    )
