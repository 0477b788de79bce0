"""NCSA's ``accounts``, on Delta and DeltaAI."""

from __future__ import annotations

import re

from fabric.launch.balances.command import no_allocation, to_amount
from fabric.launch.balances.protocol import Balance

COMMAND = "accounts"
_AMOUNTS = r"(-?[\d,.]+)\s+(-?[\d,.]+)"
_DESCRIBED_FIRST = re.compile(rf"^\s*(\S+)\s.*?\s{_AMOUNTS}\s*$", re.MULTILINE)
_DESCRIBED_LAST = re.compile(rf"^\s*(\S+)\s+{_AMOUNTS}(?:\s|$)", re.MULTILINE)
_NEWER = re.compile(r"^\s*Account\s+Balance\s?\(Hours\)\s+Deposited\s?\(Hours\)", re.MULTILINE)


def parse(output: str, project: str) -> Balance:
    """Return the balance in what ``accounts`` wrote, with the description before or after it.

    An account of the user who asks, such as ``abcd-delta-gpu``, is a project here.

    Raises:
        BalanceUnavailable: The account is not among them.
    """
    rows = _DESCRIBED_LAST if _NEWER.search(output) else _DESCRIBED_FIRST
    for name, balance, deposited in rows.findall(output):
        if name == project:
            available, granted = to_amount(balance), to_amount(deposited)
            return Balance(
                unit="hours",
                granted=granted,
                used=granted - available,
                available=available,
            )
    raise no_allocation(COMMAND, project)
