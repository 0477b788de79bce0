"""ALCF's ``sbank``."""

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

_COMMAND = "sbank-list-allocations"
_SECTION = re.compile(r"^ *([A-Za-z][\w-]*): *$")
_TOTAL = re.compile(r"^ +(Available Balance|Charged) *: *(-?[\d,.]+) +(\S.*?) *$")


@dataclass(frozen=True, slots=True, kw_only=True)
class SbankBalance:
    """A project's allocations of one machine, with all their suballocations together.

    Args:
        resource: sbank's name of the machine, such as ``polaris``.
        timeout_s: How long the command may take.
    """

    resource: str
    timeout_s: float = TIMEOUT_S

    async def balance(self, project: str) -> Balance:
        """Return a project's balance, by the totals that sbank itself makes."""
        command = (_COMMAND, "-p", check_project(project), "-r", self.resource)
        return parse(await ask(*command, timeout_s=self.timeout_s), project, self.resource)


def parse(output: str, project: str, resource: str) -> Balance:
    """Return the balance in what ``sbank-list-allocations`` wrote.

    Totals are by machine; rows are rounded, so their sums are less exact.

    Raises:
        BalanceUnavailable: There is no total of the machine.
    """
    totals: dict[str, re.Match[str]] = {}
    section = ""
    for line in output.partition("Totals:")[2].splitlines():
        if named := _SECTION.match(line):
            section = named[1].lower()
        elif section == resource.lower() and (total := _TOTAL.match(line)):
            totals[total[1]] = total
    if totals.keys() != {"Available Balance", "Charged"}:
        raise no_allocation(f"{_COMMAND} -p {project} -r {resource}", project)
    available, used = to_amount(totals["Available Balance"][2]), to_amount(totals["Charged"][2])
    return Balance(
        unit=totals["Charged"][3].lower(),
        granted=available + used,
        used=used,
        available=available,
        as_of=get_now(),
    )
