"""Units of other books, such as a centre's node-hour, and what they are worth from a time on."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from decimal import ROUND_FLOOR, Decimal
from fractions import Fraction
from math import ceil, floor

from sqlalchemy import Connection, bindparam, insert, select

from fabric.errors import RequestInvalid, UnknownUnit
from fabric.ledger.rates import MILLION, to_million
from fabric.ledger.tables import units

_LEAST, _MOST = Decimal("1e-15"), Decimal("1e15")
"""Of one amount but 0: what is outside cannot be meant, and need not be computed."""

_EFFECTIVE = (
    select(units)
    .where(units.c.name == bindparam("unit"), units.c.effective_from <= bindparam("at"))
    .order_by(units.c.effective_from.desc())
    .limit(1)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """What one of a unit is worth from a time on, in micro-SU."""

    name: str
    effective_from: datetime
    usu: Decimal

    def to_usu(self, amount: Decimal | Fraction, *, up: bool = False) -> int:
        """Return an amount of the unit in whole micro-SU, rounded down, or up.

        Raises:
            RequestInvalid: It is not 0 or a number from 1e-15 to 1e15.
        """
        if (isinstance(amount, Decimal) and not amount.is_finite()) or (
            amount and not _LEAST <= amount <= _MOST
        ):
            reason = f"an amount of {self.name} is 0 or a number from {_LEAST} to {_MOST}"
            raise RequestInvalid(param="amount", value=str(amount), reason=reason)
        exact = Fraction(amount) * Fraction(self.usu)
        return ceil(exact) if up else floor(exact)

    def from_usu(self, amount_usu: int) -> Decimal:
        """Return micro-SU in the unit, to six decimal places, rounded down."""
        return (Decimal(amount_usu) / self.usu).quantize(Decimal("0.000001"), ROUND_FLOOR)


def insert_unit(connection: Connection, unit: Unit) -> None:
    """Store what a unit is worth."""
    if not unit.name or len(unit.name.split()) != 1:
        reason = "a unit is named by one word, such as node-hour"
        raise RequestInvalid(param="unit", value=unit.name, reason=reason)
    usu = to_million("usu", unit.usu)
    if not usu:
        raise RequestInvalid(param="usu", value=str(unit.usu), reason="it is worth nothing")
    row = {"name": unit.name, "effective_from": unit.effective_from, "usu_per_million": usu}
    connection.execute(insert(units), row)


def find_unit(connection: Connection, name: str, at: datetime) -> Unit:
    """Return what a unit is worth at a time.

    Raises:
        UnknownUnit: Nobody has said.
    """
    row = connection.execute(_EFFECTIVE, {"unit": name, "at": at}).first()
    if row is None:
        raise UnknownUnit(unit=name, at=f"{at:%Y-%m-%d}")
    usu = Decimal(row.usu_per_million) / MILLION
    return Unit(name=row.name, effective_from=row.effective_from, usu=usu)


def listed(connection: Connection) -> list[Unit]:
    """Return every worth of every unit, the newest of each first."""
    found = connection.execute(select(units).order_by(units.c.name, units.c.effective_from.desc()))
    return [
        Unit(
            name=row.name,
            effective_from=row.effective_from,
            usu=Decimal(row.usu_per_million) / MILLION,
        )
        for row in found
    ]
