"""Penn State's ``mybalance``, on Roar. Other centres' commands of this name write other tables."""

from __future__ import annotations

import re

from fabric.errors import BalanceUnavailable
from fabric.launch.balances.command import no_allocation, to_amount
from fabric.launch.balances.protocol import Balance

COMMAND = "mybalance"
_HEAD = re.compile(r"^\s*Project\s+Limit\s+Used\s+Balance\b", re.MULTILINE)
_AMOUNT = r"[ \t]+(-?[\d,.]+)"
_ROW = re.compile(rf"^[ \t]*(\S+){_AMOUNT}{_AMOUNT}{_AMOUNT}(?=\s|$)", re.MULTILINE)
_UNLIMITED = re.compile(rf"^[ \t]*(\S+){_AMOUNT}(?=\s|$)", re.MULTILINE)


def parse(output: str, project: str) -> Balance:
    """Return the balance in what ``mybalance`` wrote.

    Raises:
        BalanceUnavailable: It is another table, or the account is not in it or has no limit.
    """
    if _HEAD.search(output) is None:
        raise BalanceUnavailable(
            command=COMMAND,
            reason="its table has not the columns Project, Limit, Used and Balance",
            remedy="read it yourself, and take `balance` out of the machine's site file",
        )
    for name, granted, used, available in _ROW.findall(output):
        if name == project:
            return Balance(
                unit="hours",
                granted=to_amount(granted),
                used=to_amount(used),
                available=to_amount(available),
            )
    if project in (name for name, _ in _UNLIMITED.findall(output)):
        raise BalanceUnavailable(
            command=COMMAND,
            reason=f"{project!r} has no limit there",
            remedy="there is nothing to run out of",
        )
    raise no_allocation(COMMAND, project)
