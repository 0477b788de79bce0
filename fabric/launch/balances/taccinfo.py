"""TACC's ``taccinfo``."""

from __future__ import annotations

import re

from fabric.launch.balances.command import no_allocation, to_amount
from fabric.launch.balances.protocol import Balance

COMMAND = "/usr/local/etc/taccinfo"
_CELL = re.compile(r"\| +(\S+) +(-?[\d,.]+) +\d{4}-\d\d-\d\d (?=\|| *$)", re.MULTILINE)


def parse(output: str, project: str) -> Balance:
    """Return the balance in what ``taccinfo`` wrote: two projects a line, then the disk quotas.

    It tells those of the user who asks, in the SU of the machine that is asked, and only what is
    left.

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
            )
    raise no_allocation(COMMAND, project)
