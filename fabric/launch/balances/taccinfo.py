"""TACC's ``taccinfo``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fabric.launch.balances.command import (
    TIMEOUT_S,
    ask,
    check_project,
    get_now,
    no_allocation,
    to_amount,
)
from fabric.launch.balances.protocol import Balance

_COMMAND = "/usr/local/etc/taccinfo"
_CELL = re.compile(r"\| +(\S+) +(-?[\d,.]+) +\d{4}-\d\d-\d\d (?=\|| *$)", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaccinfoBalance:
    """The projects of the user who asks, on the machine that is asked; in its SU."""

    timeout_s: float = TIMEOUT_S

    async def balance(self, project: str) -> Balance:
        """Return what a project has left; TACC does not tell what it was granted."""
        check_project(project)
        return parse(await ask(_COMMAND, timeout_s=self.timeout_s), project)


def parse(output: str, project: str) -> Balance:
    """Return the balance in what ``taccinfo`` wrote: two projects a line, then the disk quotas.

    Raises:
        BalanceUnavailable: The project is not among them.
    """
    for name, available in _CELL.findall(output.partition("Disk quotas")[0]):
        if name == project:
            return Balance(
                unit="SU",
                granted=None,
                used=None,
                available=to_amount(available),
                as_of=get_now(),
            )
    raise no_allocation(_COMMAND, project)
