"""The site's scheduler, and what its project has left."""

from __future__ import annotations

import asyncio
import functools
import math
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

from fabric.cli.doctor.check import Finding
from fabric.config import EndpointSpec, SiteSpec
from fabric.config.endpoint import to_seconds
from fabric.errors import BalanceUnavailable, SchedulerFailed, SettingInvalid


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerCheck:
    """Would the scheduler take the blocks that the site's file describes? Nothing is submitted."""

    endpoint: EndpointSpec
    name: str = "scheduler"

    def run(self) -> Iterator[Finding]:
        """Ask about a block in the site's own partition or queue, and in each that callers may
        choose."""
        from fabric.launch.waits import estimate_wait

        spec = self.endpoint
        field = {"slurm": "partition", "pbspro": "queue"}.get(spec.scheduler)
        if field is None:
            detail = "blocks are started without one"
            yield Finding(check=self.name, level="skipped", detail=detail)
            return
        for where in dict.fromkeys([getattr(spec, field), *getattr(spec.choices, field)]):
            options = {field: where} if where else {}
            if spec.scheduler == "slurm":
                asked = {"account": spec.account, "walltime": spec.walltime}
                options |= {name: value for name, value in asked.items() if value}
                options |= {"nodes": str(spec.nodes_per_block)}
            label = f"{field} {where}" if where else f"the default {field}"
            try:
                wait_s = estimate_wait(spec.scheduler, options)["wait_s"]["p50"]
            except SchedulerFailed as error:
                yield Finding(
                    check=self.name,
                    level="wrong",
                    detail=f"{label}: {error.detail['command']}: {error.detail['reason']}",
                    remedy=f"on the login node, compare `sinfo` or `qstat -Q` with {field}, account"
                    " and walltime in the site's file",
                )
                continue
            longest_s = get_longest_s(where) if spec.scheduler == "slurm" else math.inf
            if spec.walltime and to_seconds(spec.walltime) > longest_s:
                yield Finding(
                    check=self.name,
                    level="wrong",
                    detail=f"{label}: its jobs run for {longest_s / 60:.0f} minutes at most, so a"
                    f" block of {spec.walltime} would wait for ever",
                    remedy="ask for a shorter walltime in the site's file, or another partition",
                )
                continue
            when = "at some time" if wait_s is None else f"in about {wait_s:.0f} s"
            detail = f"{label}: a block would start {when}"
            yield Finding(check=self.name, level="ok", detail=detail)


def get_longest_s(partition: str | None) -> float:
    """Return how long jobs of a Slurm partition may run; ``inf`` where Slurm does not say.

    Most controllers take jobs that are longer, and never start them (``EnforcePartLimits``).
    """
    command = ["sinfo", "--noheader", "--format=%l"]
    command += [f"--partition={partition}"] if partition else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return math.inf
    return max(map(_to_s, done.stdout.split()), default=math.inf)


def _to_s(limit: str) -> float:
    """Return a limit such as ``2-00:00:00``, ``1:00:00`` or ``5:00`` in seconds."""
    days, _, clock = limit.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdigit() for part in (*parts, days or "0")):
        return math.inf
    seconds = functools.reduce(lambda total, part: 60 * total + int(part), parts, 0)
    return float(86_400 * int(days or 0) + seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class BalanceCheck:
    """Has the project that blocks are charged to anything left at the centre?

    Args:
        site: Whose centre.
        project: What jobs there are charged to; ``None`` where the site's file does not say.
        token: Of the facility's API, where it has one.
    """

    site: SiteSpec
    project: str | None
    token: str | None = None
    name: str = "balance"

    def run(self) -> Iterator[Finding]:
        """Ask the centre's own accounting."""
        from fabric.launch.balances import get_balance_source

        try:
            source = get_balance_source(self.site, self.token)
        except SettingInvalid as error:
            detail = str(error.detail["reason"])
            yield Finding(check=self.name, level="skipped", detail=detail)
            return
        if self.project is None:
            detail = "the file says no account under endpoint; name one with --project"
            yield Finding(check=self.name, level="skipped", detail=detail)
            return
        try:
            found = asyncio.run(source.balance(self.project))
        except BalanceUnavailable as error:
            told = error.detail
            yield Finding(
                check=self.name,
                level="wrong",
                detail=f"{told['command']}: {told['reason']}",
                remedy=str(told["remedy"]),
            )
            return
        left = f"{self.project} has {found.available:,f} {found.unit} left"
        if found.available <= 0:
            yield Finding(
                check=self.name,
                level="wrong",
                detail=left,
                remedy="ask the centre for more, or name another account in the site's file",
            )
        elif found.granted and found.available < found.granted / 10:
            remedy = "ask the centre for more before it is spent"
            yield Finding(check=self.name, level="warning", detail=left, remedy=remedy)
        else:
            yield Finding(check=self.name, level="ok", detail=left)
