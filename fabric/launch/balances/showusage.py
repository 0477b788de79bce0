"""OLCF's ``showusage``."""

from __future__ import annotations

import re
from datetime import UTC, datetime

from fabric.errors import BalanceUnavailable
from fabric.launch.balances.command import no_allocation, to_amount
from fabric.launch.balances.protocol import Balance

COMMAND = "showusage"
_AMOUNT = r"\s*(-?[\d,.]+)\s*"
_ROW = re.compile(rf"^\s*(\S+)\s*\|{_AMOUNT}\|{_AMOUNT}\|{_AMOUNT}\|", re.MULTILINE)


def parse(output: str, project: str) -> Balance:
    """Return the balance in what ``showusage`` wrote: this year's, up to the last midnight.

    Raises:
        BalanceUnavailable: The project is not among them, or is there with different amounts.
    """
    found = {
        tuple(map(to_amount, amounts))
        for name, *amounts in _ROW.findall(output)
        if name.lower() == project.lower()
    }
    if not found:
        raise no_allocation(COMMAND, project)
    if len(found) > 1:
        raise BalanceUnavailable(
            command=COMMAND,
            reason=f"it tells {len(found)} different balances of {project!r}",
            remedy="ask on a login node of the one machine that you mean",
        )
    ((granted, used, available),) = found
    # The day ends where the machine is.
    midnight = datetime.now().astimezone().replace(hour=0, minute=0, second=0, microsecond=0)
    return Balance(
        unit="node-hours",
        granted=granted,
        used=used,
        available=available,
        as_of=midnight.astimezone(UTC),
    )
