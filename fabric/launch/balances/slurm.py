"""Slurm's own limits: ``GrpTRESMins`` of the account, or of its quality of service."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from decimal import Decimal

from fabric.errors import BalanceUnavailable
from fabric.launch.balances import sreport
from fabric.launch.balances.command import TIMEOUT_S, ask, check_project, no_allocation
from fabric.launch.balances.protocol import Balance

_COMMAND = ("scontrol", "show", "assoc_mgr", "flags=assoc,qos")
_MINUTES = re.compile(r"\bGrpTRESMins=(\S*)")
_ACCOUNT = re.compile(r"^ClusterName=\S* Account=(\S+) UserName= ", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class SlurmBalance:
    """What Slurm lets an account use, in hours of a trackable resource.

    Usage decays where Slurm is told so; then what is available grows by itself. Where the
    controller shows neither the account nor a limit of its quality of service, the database is
    asked (``sreport``).

    Args:
        tres: The resource that is limited; ``billing`` is what charges are made of.
        since: The day from which the database's usage counts, if Slurm never resets it.
        timeout_s: How long each command may take.
    """

    tres: str = "billing"
    since: date | None = None
    timeout_s: float = TIMEOUT_S

    async def balance(self, project: str) -> Balance:
        """Return an account's balance."""
        command = (*_COMMAND, f"accounts={check_project(project)}")
        told = await ask(*command, timeout_s=self.timeout_s)
        if _is_shown(told, project) or _get_limits(told, project, self.tres):
            return parse(told, project, self.tres)
        return await sreport.get_balance(project, self.tres, self.since, timeout_s=self.timeout_s)


def parse(output: str, project: str, tres: str = "billing") -> Balance:
    """Return the least balance of the limits that hold for an account.

    Source: ``_print_tres_line`` of Slurm's src/scontrol/info_assoc_mgr.c; a limit and its usage are
    ``limit(used)`` in minutes, and ``N`` is no limit.

    Raises:
        BalanceUnavailable: The account is not there, or nothing limits it.
    """
    shown = " ".join((*_COMMAND, f"accounts={project}"))
    if not any(_records(output, project)):
        raise no_allocation(shown, project)
    limits = _get_limits(output, project, tres)
    if not limits:
        raise BalanceUnavailable(
            command=shown,
            reason=f"no GrpTRESMins limits the {tres} of {project!r}",
            remedy="there is nothing to run out of, or the centre accounts by other means",
        )
    granted, used = min(limits, key=lambda limit: limit[0] - limit[1])
    return Balance(
        unit=f"{tres} hours",
        granted=Decimal(granted) / 60,
        used=Decimal(used) / 60,
        available=Decimal(granted - used) / 60,
    )


def _is_shown(output: str, project: str) -> bool:
    return any(named[1] == project for named in _ACCOUNT.finditer(output))


def _get_limits(output: str, project: str, tres: str) -> list[tuple[int, int]]:
    """Return the limits that hold for an account, each with its usage, in minutes."""
    pattern = re.compile(rf"(?:^|,){re.escape(tres)}=(\d+)\((\d+)\)")
    told = (_MINUTES.search(record) for record in _records(output, project))
    found = (each for minutes in told if minutes for each in pattern.findall(minutes[1]))
    return [(int(limit), int(used)) for limit, used in found]


def _records(output: str, project: str) -> Iterator[str]:
    """Return the account's own record, and those of each quality of service that counts it."""
    for record in re.split(r"^(?=ClusterName=|QOS=)", output, flags=re.MULTILINE):
        if named := _ACCOUNT.match(record):
            if named[1] == project:
                yield record
        elif record.startswith("QOS="):
            accounts = record.partition("Account Limits")[2].partition("User Limits")[0]
            if re.search(rf"^ +{re.escape(project)}$", accounts, re.MULTILINE):
                yield record
