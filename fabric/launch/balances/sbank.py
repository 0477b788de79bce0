"""ALCF's ``sbank``."""

from __future__ import annotations

import re

from fabric.launch.balances.command import no_allocation, to_amount
from fabric.launch.balances.protocol import Balance

COMMAND = "sbank-list-allocations -p {project} -r {resource}"
_SECTION = re.compile(r"^ *([A-Za-z][\w-]*): *$")
_TOTAL = re.compile(r"^ +(Available Balance|Charged) *: *(-?[\d,.]+) +(\S.*?) *$")


def parse(output: str, project: str, resource: str) -> Balance:
    """Return the balance in what ``sbank-list-allocations`` wrote.

    Totals are by machine, with all the project's suballocations together; rows are rounded, so
    their sums are less exact.

    Args:
        output: What it wrote.
        project: Whose balance.
        resource: sbank's name of the machine, such as ``polaris``.

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
        raise no_allocation(COMMAND.format(project=project, resource=resource), project)
    available, used = to_amount(totals["Available Balance"][2]), to_amount(totals["Charged"][2])
    return Balance(
        unit=totals["Charged"][3].lower(),
        granted=available + used,
        used=used,
        available=available,
    )
