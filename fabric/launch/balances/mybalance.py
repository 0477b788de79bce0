"""``mybalance``, on Penn State's Roar and on Purdue's Anvil; other centres' write other tables."""

from __future__ import annotations

import re

from fabric.errors import BalanceUnavailable
from fabric.launch.balances.command import no_allocation, to_amount
from fabric.launch.balances.protocol import Balance

COMMAND = "mybalance"
_AMOUNT = r"[ \t]+(-?\d[\d,.]*)"
_ROAR = re.compile(r"^\s*Project\s+Limit\s+Used\s+Balance\b", re.MULTILINE)
_ROAR_ROW = re.compile(rf"^[ \t]*(\S+)(?:{3 * _AMOUNT}|[ \t]+[\d.]+)(?=\s|$)", re.MULTILINE)
_ANVIL = re.compile(r"^Allocation +Type +SU Limit +SU Usage +SU Usage +SU Balance", re.MULTILINE)
_ANVIL_ROW = re.compile(
    rf"^(\S+) +[A-Z]+(?: +None|{_AMOUNT}){_AMOUNT} +\S+(?: +Inf| +n/a|{_AMOUNT})$", re.MULTILINE
)


def parse(output: str, project: str) -> Balance:
    """Return the balance in what ``mybalance`` wrote of an account, which is a project here.

    Roar counts hours of cores, as Slurm's own limit there does; Anvil counts SU, of an account for
    CPUs or for GPUs, and hides a balance below nothing.

    Raises:
        BalanceUnavailable: It is another table, or the account is not in it, is there twice, or has
            no limit.
    """
    if _ANVIL.search(output):
        unit, rows = "SU", _ANVIL_ROW.findall(output)
    elif _ROAR.search(output):
        unit, rows = "hours", _ROAR_ROW.findall(output)
    else:
        raise BalanceUnavailable(
            command=COMMAND,
            reason="its table has not the columns of Roar's or Anvil's (Project, Limit, Used and"
            " Balance; Allocation, Type, SU Limit, SU Usage and SU Balance)",
            remedy="read it yourself, and take `balance` out of the machine's site file",
        )
    found = [amounts for name, *amounts in rows if name == project]
    if not found:
        raise no_allocation(COMMAND, project)
    if len(found) > 1:
        raise BalanceUnavailable(
            command=COMMAND,
            reason=f"it tells {len(found)} balances of {project!r}",
            remedy="read it yourself, and name an account that has one",
        )
    ((limit, usage, left),) = found
    if not limit:
        raise BalanceUnavailable(
            command=COMMAND,
            reason=f"{project!r} has no limit there",
            remedy="there is nothing to run out of",
        )
    granted, used = to_amount(limit), to_amount(usage)
    available = to_amount(left) if left else granted - used
    return Balance(unit=unit, granted=granted, used=used, available=available)
