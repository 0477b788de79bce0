"""What a launch will take: memory, nodes, time in the queue, and what the machine charges."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from fabric.config import SiteSpec
from fabric.config.system import Queue, System
from fabric.errors import LaunchImpossible, PlanError, RequestInvalid, SchedulerFailed
from fabric.launch.forecast import WaitForecast
from fabric.launch.jobs.division import Division, get_division
from fabric.launch.jobs.history import History
from fabric.launch.jobs.limits import check_limits, choose_queue
from fabric.launch.jobs.memory import Fit, get_fit
from fabric.launch.jobs.order import Order
from fabric.launch.jobs.queue import Scheduler
from fabric.launch.jobs.staging import Staging, choose_staging, count_reads
from fabric.launch.jobs.submit import ParslSubmitter, get_warning_s
from fabric.launch.waits import estimate_wait
from fabric.planning import find_shape
from fabric.planning.model_shape import ModelShape

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

    def get_submitter(self, script_dir: Path) -> ParslSubmitter:
        """Return what takes the order's jobs to the scheduler."""
        return ParslSubmitter(self.site, self.order, self.queue, script_dir)


def get_launch_plan(
    order: Order, site: SiteSpec, history: History, *, source: str | None = None
) -> LaunchPlan:
    """Return how an order would be met. Asks the scheduler, and changes nothing.

    Args:
        order: What is asked for.
        site: The machine's file.
        history: Of earlier jobs.
        source: Where the model's files are, if they are on this machine.

    Raises:
        LaunchImpossible: The machine cannot do it; says what it could.
    """
    system = site.system
    if system is None or system.scheduler not in _SCHEDULERS:
        reason = "its file does not say which scheduler it has"
        raise LaunchImpossible(param="machine", value=order.machine, reason=reason)
    scheduler = _SCHEDULERS[system.scheduler]
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
        hint_s=_ask(scheduler, order, name, queue),
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
        charge=_charge(order, system, queue),
        unit=system.charge.unit if system.charge else "",
    )


def get_command(plan: LaunchPlan, spec: Path, log: Path, module: str) -> list[str]:
    """Return what a job of a plan runs on its first node."""
    order, ranks = plan.order, plan.division.ranks
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


def _ask(scheduler: Scheduler, order: Order, name: str | None, queue: Queue | None) -> float | None:
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
        waits = estimate_wait(scheduler, options)
    except (SchedulerFailed, RequestInvalid):
        return None  # it is only a hint; a refusal comes with its words when the job is submitted
    expected: float | None = waits["wait_s"]["p50"]
    return expected


def _charge(order: Order, system: System, queue: Queue | None) -> float | None:
    if queue is None or queue.units_per_node_hour is None:
        return None
    least = system.charge.min_hours if system.charge else 0.0
    hours = max(least, order.walltime_s / 3600)
    factor = 1.0 if queue.charge_factor is None else queue.charge_factor
    return queue.units_per_node_hour * factor * order.nodes * hours
