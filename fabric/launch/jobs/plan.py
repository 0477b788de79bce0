"""What a launch will take: memory, nodes, time in the queue, and what the machine charges."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from fabric.config import SiteSpec
from fabric.config.system import Queue
from fabric.errors import FabricError, LaunchImpossible, PlanError
from fabric.launch.forecast import WaitForecast
from fabric.launch.jobs.accounting import get_charge
from fabric.launch.jobs.division import Division, get_division
from fabric.launch.jobs.history import History
from fabric.launch.jobs.limits import check_limits, choose_queue
from fabric.launch.jobs.memory import Fit, get_fit
from fabric.launch.jobs.order import Order
from fabric.launch.jobs.queue import Scheduler
from fabric.launch.jobs.staging import Staging, choose_staging, count_reads
from fabric.launch.jobs.submit import get_warning_s
from fabric.launch.waits import estimate_wait
from fabric.planning import find_shape
from fabric.planning.model_shape import ModelShape

Ask = Callable[[str, Mapping[str, object]], float | None]
"""Asks a scheduler how many seconds a job with such options would wait."""

_SCHEDULERS: dict[str, Scheduler] = {"local": "local", "slurm": "slurm", "pbspro": "pbspro"}


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchPlan:
    """An order that can be met, as far as anybody knows.

    Args:
        order: What was asked for.
        site: The machine.
        scheduler: What takes its jobs.
        queue: Where they go; ``None`` leaves it to the scheduler.
        fit: How the model fits the nodes.
        division: How it is divided among their processes.
        staging: Whether its weights are copied to the nodes' own disks.
        wait: How long a job should wait.
        load_s: How long an instance should take from its job's start until it is ready.
        charge: What the machine charges for one job at its longest, in its own unit; ``None``
            where its file does not say.
        unit: That unit.
    """

    order: Order
    site: SiteSpec
    scheduler: Scheduler
    queue: str | None
    fit: Fit
    division: Division
    staging: Staging
    wait: WaitForecast
    load_s: float
    charge: float | None
    unit: str

    @property
    def total_charge(self) -> float | None:
        """What the machine charges for all of the order's jobs at their longest."""
        if self.charge is None:
            return None
        order = self.order
        num_after = 0
        if order.keep_until is not None:
            lasts_s = (order.keep_until - datetime.now(UTC)).total_seconds()
            num_after = max(0, math.ceil(lasts_s / order.walltime_s) - 1)
        return self.charge * order.replicas * (1 + num_after)


def get_launch_plan(
    order: Order,
    site: SiteSpec,
    history: History,
    *,
    source: str | None = None,
    ask: Ask | None = None,
) -> LaunchPlan:
    """Return how an order would be met. Asks the scheduler, and changes nothing.

    Args:
        order: What is asked for.
        site: The machine's file.
        history: Of earlier jobs.
        source: Where the model's files are, if they are on this machine.
        ask: Asks the scheduler for the wait; without it the one of this machine is asked.

    Raises:
        LaunchImpossible: The machine cannot do it; says what it could.
    """
    scheduler, system = get_scheduler(site), site.system
    assert system is not None
    name, queue = choose_queue(order, system)
    if name is not None and queue is not None:
        check_limits(order, name, queue)
    kind = system.nodes.get(queue.nodes) if queue is not None and queue.nodes else None
    if scheduler == "local" and order.nodes > 1:
        reason = "its jobs are processes of one machine"
        raise LaunchImpossible(param="nodes", value=order.nodes, reason=reason)
    fit = get_fit(order, _find_shape(order, source), kind)
    division = get_division(order, fit.plan)
    staging = choose_staging(
        num_bytes=fit.weight_bytes,
        reads=count_reads(division.options, division.ranks),
        storage=system.storage,
        wish=order.staging,
    )
    wait = history.forecast_wait(
        order.machine,
        name or "",
        nodes=order.nodes,
        walltime_s=order.walltime_s,
        hint_s=_ask(ask or ask_here, scheduler, order, name, queue),
    )
    return LaunchPlan(
        order=order,
        site=site,
        scheduler=scheduler,
        queue=name,
        fit=fit,
        division=division,
        staging=staging,
        wait=wait,
        load_s=history.predict_load_s(order.machine, order.model, fit.weight_bytes),
        charge=get_charge(system, queue, num_nodes=order.nodes, elapsed_s=order.walltime_s),
        unit=system.charge.unit if system.charge else "",
    )


def get_scheduler(site: SiteSpec) -> Scheduler:
    """Return what takes a machine's jobs.

    Raises:
        LaunchImpossible: Its file does not say.
    """
    if site.system is None or site.system.scheduler not in _SCHEDULERS:
        reason = "its file does not say which scheduler it has"
        raise LaunchImpossible(param="machine", value=site.name, reason=reason)
    return _SCHEDULERS[site.system.scheduler]


def get_command(
    order: Order, ranks: Sequence[int], spec: Path, log: Path, module: str
) -> list[str]:
    """Return what a job of an order runs on its first node, with so many processes on each."""
    return [
        *(sys.executable, "-m", "fabric.launch.jobs.inblock", str(spec), str(log)),
        *("--walltime-s", str(order.walltime_s)),
        *("--warning-s", str(get_warning_s(order.walltime_s))),
        *(("--ranks", *map(str, ranks)) if len(ranks) > 1 else ()),
        *(("--module", module) if module != "fabric.instance" else ()),
    ]


def _find_shape(order: Order, source: str | None) -> ModelShape | None:
    name = order.model.partition("@")[0]
    for asked in filter(None, (source, name, name.removesuffix("-instruct"))):
        try:
            return find_shape(asked)
        except PlanError:
            continue
    return None


def ask_here(scheduler: str, options: Mapping[str, object]) -> float | None:
    """Return the wait that the scheduler of this very machine expects, in seconds.

    Raises:
        SchedulerFailed: It does not answer.
        RequestInvalid: It is not asked by such options.
    """
    expected: float | None = estimate_wait(scheduler, dict(options))["wait_s"]["p50"]
    return expected


def _ask(
    ask: Ask, scheduler: Scheduler, order: Order, name: str | None, queue: Queue | None
) -> float | None:
    """Return the wait that the scheduler itself expects of such a job, in seconds."""
    options: dict[str, object] = {}
    if scheduler == "slurm":
        field = "qos" if queue is not None and queue.kind == "qos" else "partition"
        options = {"nodes": order.nodes, "walltime": order.walltime}
        options |= {field: name} if name else {}
        options |= {"account": order.account} if order.account else {}
    elif scheduler == "pbspro" and name:
        options = {"queue": name}
    try:
        return ask(scheduler, options)
    except FabricError:
        return None  # it is only a hint; a refusal comes with its words when the job is submitted
