"""NCSA's ``accounts``, on Delta and DeltaAI."""

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

_COMMAND = "accounts"
_AMOUNTS = r"(-?[\d,.]+)\s+(-?[\d,.]+)"
_DESCRIBED_FIRST = re.compile(rf"^\s*(\S+)\s.*?\s{_AMOUNTS}\s*$", re.MULTILINE)
_DESCRIBED_LAST = re.compile(rf"^\s*(\S+)\s+{_AMOUNTS}(?:\s|$)", re.MULTILINE)
_NEWER = re.compile(r"^\s*Account\s+Balance\s?\(Hours\)\s+Deposited\s?\(Hours\)", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class AccountsBalance:
    """The accounts of the user who asks, such as ``abcd-delta-gpu``; one is a project here."""

    timeout_s: float = TIMEOUT_S

    async def balance(self, project: str) -> Balance:
        """Return an account's balance."""
        check_project(project)
        return parse(await ask(_COMMAND, timeout_s=self.timeout_s), project)


def parse(output: str, project: str) -> Balance:
    """Return the balance in what ``accounts`` wrote, with the description before or after it.

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
                as_of=get_now(),
            )
    raise no_allocation(_COMMAND, project)
