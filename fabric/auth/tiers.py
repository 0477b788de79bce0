"""What administrators change of the tiers, in the database; all else is as the release has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from decimal import Decimal

from sqlalchemy import delete, insert

from fabric.auth.rules import TierTerms, raise_version, read_tiers
from fabric.auth.tables import tiers
from fabric.errors import NotFound, RequestInvalid
from fabric.sql import Database

MILLION = 1_000_000
_SECONDS = (0.001, 86_400.0)
_PARTS = (0.001, 0.9999)
_BOUNDS = {
    "charge_factor": (1 / MILLION, 1_000.0),
    "weight": (0.001, 1_000.0),
    "first_token_s": _SECONDS,
    "token_s": _SECONDS,
    "share_in_time": _PARTS,
    "share_answered": _PARTS,
}


class Tiers:
    """Changes of tiers on one database; a hub hears of them within a second.

    Args:
        database: An open, migrated database.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def changed(self) -> dict[str, TierTerms]:
        """Return what was changed, by tier."""
        with self._database.read() as connection:
            return read_tiers(connection)

    def modify(self, tier: str, terms: Mapping[str, float]) -> TierTerms:
        """Change some of a tier's parameters. Whether it has them is the broker's to say.

        Args:
            tier: Its name.
            terms: Fields of ``TierTerms`` and their values.

        Raises:
            RequestInvalid: A value is out of its bounds.
        """
        for name, value in terms.items():
            _check(name, value)
        with self._database.transaction() as connection:
            before = read_tiers(connection).get(tier, TierTerms(tier=tier))
            row = asdict(before) | dict(terms)
            factor = row.pop("charge_factor")
            row["charge_factor_millionths"] = None if factor is None else int(_millionths(factor))
            connection.execute(delete(tiers).where(tiers.c.tier == tier))
            connection.execute(insert(tiers), row)
            raise_version(connection)
            return read_tiers(connection)[tier]

    def delete(self, tier: str) -> TierTerms:
        """Make a tier as the release has it again; return what was changed of it.

        Raises:
            NotFound: Nothing was.
        """
        with self._database.transaction() as connection:
            if (found := read_tiers(connection).get(tier)) is None:
                raise NotFound(kind="change of the tier", name=tier)
            connection.execute(delete(tiers).where(tiers.c.tier == tier))
            raise_version(connection)
        return found


def _check(name: str, value: float) -> None:
    least, most = _BOUNDS[name]
    reason = f"it is from {least:g} to {most:g}"
    if name == "charge_factor":
        reason += ", with at most six decimal places"
    if not least <= value <= most or (name == "charge_factor" and _millionths(value) % 1):
        raise RequestInvalid(param=name, value=str(value), reason=reason)


def _millionths(factor: float | Decimal) -> Decimal:
    """Return a factor as it is written, in millionths."""
    return Decimal(str(factor)) * MILLION
