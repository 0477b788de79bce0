"""Records of raw calls whose tickets were redeemed."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, RowMapping, bindparam, func, insert, select, update

from fabric.catalog.records import RedemptionRecord
from fabric.catalog.tables import redemptions

_BY_RUN = select(redemptions).where(redemptions.c.run == bindparam("id")).with_for_update()
_OPEN = select(redemptions).where(redemptions.c.charge_usu.is_(None))
_COMMITTED = select(
    func.sum(func.coalesce(redemptions.c.charge_usu, redemptions.c.held_usu))
).where(redemptions.c.ticket == bindparam("id"))
_CLOSE = (
    update(redemptions)
    .where(redemptions.c.run == bindparam("id"), redemptions.c.charge_usu.is_(None))
    .values(charge_usu=bindparam("charged"))
)


def add(connection: Connection, redemption: RedemptionRecord) -> None:
    """Store one. See ``Catalog.add_redemption``."""
    row = {column.name: getattr(redemption, column.name) for column in redemptions.c}
    connection.execute(insert(redemptions), row)


def find(connection: Connection, run: str) -> RedemptionRecord | None:
    """Return one if there is one. See ``Catalog.redemption``."""
    row = connection.execute(_BY_RUN, {"id": run}).first()
    return None if row is None else _to_redemption(row._mapping)


def still_open(connection: Connection) -> Sequence[RedemptionRecord]:
    """Return those whose books are open. See ``Catalog.open_redemptions``."""
    return [_to_redemption(row._mapping) for row in connection.execute(_OPEN)]


def committed_usu(connection: Connection, ticket: str) -> int:
    """Return what a ticket was charged and holds. See ``Catalog.committed_usu``."""
    return int(connection.execute(_COMMITTED, {"id": ticket}).scalar() or 0)


def close(connection: Connection, run: str, charge_usu: int) -> None:
    """Close the books on one. See ``Catalog.close_redemption``."""
    connection.execute(_CLOSE, {"id": run, "charged": charge_usu})


def _to_redemption(row: RowMapping) -> RedemptionRecord:
    return RedemptionRecord(**{column.name: row[column.name] for column in redemptions.c})
