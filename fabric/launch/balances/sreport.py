"""Slurm's database: an account's own limit as ``sacctmgr`` tells it, its usage as ``sreport`` does.

Where ``PrivateData=usage`` the controller shows a user no account; the database may still do so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal

from fabric.errors import BalanceUnavailable
from fabric.launch.balances.command import TIMEOUT_S, ask, no_allocation
from fabric.launch.balances.protocol import Balance

COUNTING = "scontrol show config"
LIMIT = "sacctmgr -nP show assoc cluster={cluster} account={project} user= format=GrpTRESMins"
USED = (
    "sreport -P -t Minutes -T {tres} cluster AccountUtilizationByUser Accounts={project}"
    " Start={start} End=now format=Account,Login,Used"
)
_UNTIL = re.compile(
    r"^Cluster/Account/User Utilization \S+ - (\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d) ", re.MULTILINE
)


async def get_balance(
    project: str, tres: str, since: date | None, *, timeout_s: float = TIMEOUT_S
) -> Balance:
    """Return what an account may use yet of a trackable resource, in hours.

    Args:
        project: The account.
        tres: The resource that is limited.
        since: The day from which usage counts; ``None``: since Slurm itself last reset it.
        timeout_s: How long each command may take.

    Raises:
        BalanceUnavailable: One of the commands fails, the account has no limit of its own, or
            since when its usage counts is not known.
    """
    config = parse_config(await ask(*COUNTING.split(), timeout_s=timeout_s))
    limit = LIMIT.format(cluster=config.get("ClusterName", ""), project=project)
    told = await ask(*limit.split(), timeout_s=timeout_s)
    if not told:
        raise no_allocation(limit, project)
    granted = parse_limits(told).get(tres)
    if granted is None:
        raise BalanceUnavailable(
            command=limit,
            reason=f"no GrpTRESMins of its own limits the {tres} of {project!r}",
            remedy="there is nothing to run out of, or the centre accounts by other means",
        )
    start = get_start(config, datetime.now().astimezone().date(), since)
    used = USED.format(tres=tres, project=project, start=start)
    minutes, until = parse_usage(await ask(*used.split(), timeout_s=timeout_s), project)
    return Balance(
        unit=f"{tres} hours",
        granted=Decimal(granted) / 60,
        used=Decimal(minutes) / 60,
        available=Decimal(granted - minutes) / 60,
        as_of=until,
    )


def parse_config(output: str) -> dict[str, str]:
    """Return what ``scontrol show config`` wrote."""
    pairs = (line.partition(" = ") for line in output.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def parse_limits(output: str) -> dict[str, int]:
    """Return an account's limits in minutes, by resource, from what ``sacctmgr`` wrote."""
    return {name: int(minutes) for name, minutes in re.findall(r"([^=,\s]+)=(\d+)", output)}


def get_start(config: Mapping[str, str], today: date, since: date | None = None) -> date:
    """Return the day from which usage counts.

    Source: ``PriorityUsageResetPeriod`` and ``PriorityDecayHalfLife`` in slurm.conf(5).

    Args:
        config: Of the controller.
        today: Where the machine is.
        since: The day, if the site's file says it.

    Raises:
        BalanceUnavailable: Usage decays, which sreport's does not, or is never reset.
    """
    half_life = config.get("PriorityDecayHalfLife", "00:00:00")
    if half_life != "00:00:00":
        raise BalanceUnavailable(
            command=COUNTING,
            reason=f"usage is halved every {half_life} there, and sreport tells all of it",
            remedy="have the centre show its users `scontrol show assoc_mgr`",
        )
    if since is not None:
        return since
    match period := config.get("PriorityUsageResetPeriod", "NONE"):
        case "DAILY":
            return today
        case "WEEKLY":
            return today - timedelta(days=today.isoweekday() % 7)
        case "MONTHLY":
            return today.replace(day=1)
        case "QUARTERLY":
            return today.replace(month=(today.month - 1) // 3 * 3 + 1, day=1)
        case "YEARLY":
            return today.replace(month=1, day=1)
    raise BalanceUnavailable(
        command=COUNTING,
        reason=f"PriorityUsageResetPeriod is {period}, so since when usage counts is not known",
        remedy="say the day under `balance` in the machine's site file, as in since: 2026-10-01",
    )


def parse_usage(output: str, project: str) -> tuple[int, datetime]:
    """Return what an account has used in minutes, and up to when, from what ``sreport`` wrote.

    An account that used nothing has no row; an hour that is not over is not in it.

    Raises:
        BalanceUnavailable: It is another report.
    """
    told = _UNTIL.search(output)
    if told is None:
        raise BalanceUnavailable(
            command="sreport",
            reason="what it wrote is no report of AccountUtilizationByUser",
            remedy="run the command yourself",
        )
    until = datetime.fromisoformat(told[1]) + timedelta(seconds=1)
    used = re.search(rf"^{re.escape(project)}\|\|(\d+)$", output, re.MULTILINE)
    return int(used[1]) if used else 0, until.astimezone(UTC)
