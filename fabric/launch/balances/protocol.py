"""What every source of balances answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """What a project was granted, has used and has left, in the centre's own ``unit``.

    ``available`` is the centre's own figure and negative where it lets projects overdraw; the
    others are ``None`` where it does not tell them. Whatever was used after ``as_of`` is not in it.
    """

    unit: str
    granted: Decimal | None
    used: Decimal | None
    available: Decimal
    as_of: datetime = field(default_factory=lambda: datetime.now(UTC))


class BalanceSource(Protocol):
    """A centre's accounting."""

    async def balance(self, project: str) -> Balance:
        """Return a project's balance; asks anew each time.

        Args:
            project: The name that jobs are charged to.

        Raises:
            RequestInvalid: The project's name has characters that no project's name has.
            BalanceUnavailable: The centre did not answer in time, refused, or knows of no
                allocation of the project.
        """
        ...
