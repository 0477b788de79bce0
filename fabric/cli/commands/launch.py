"""``fabric launch``: a model in jobs of one's own."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Literal

import click

from fabric.cli.options import client_options
from fabric.cli.output import Output, note

if TYPE_CHECKING:
    from fabric.launch.jobs import LaunchPlan, Order
    from fabric.launch.jobs.means import Means
    from fabric.sdk import Fabric

_EPILOG = """\b
Examples:
  fabric launch smollm2-135m-instruct --site local-slurm --walltime 00:30:00
  fabric launch Llama-3-70B@1 --site nersc-perlmutter --account m1234 \\
      --nodes 1 --walltime 02:00:00 --dry-run
  fabric launch mymodel --site local-slurm --walltime 01:00:00 \\
      --keep-alive-until 8h --idle-stop 20m --wait

Run it where the machine's batch commands are (its login node), or anywhere with
--via endpoint. Nothing is charged here for what your own jobs serve: the machine
charges you. The launch goes on when this command has ended; `fabric instances`
shows it, and `fabric stop` ends it.
"""
_ENGINE = ("backend", "max_rows", "dtype", "tensor_parallel", "pipeline_parallel")
_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


class Duration(click.ParamType):
    """A time such as 20m, 8h or 2d, in seconds."""

    name = "duration"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return the seconds."""
        found = _DURATION.fullmatch(str(value))
        if found is None:
            self.fail(f"{value!r} is no time; write one such as 90s, 20m, 8h or 2d", param, ctx)
        return float(found[1]) * _SECONDS[found[2]]


class Until(click.ParamType):
    """A moment: a duration from now, or an ISO 8601 time."""

    name = "time"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> datetime:
        """Return the moment, in UTC."""
        text, now = str(value), datetime.now(UTC)
        if _DURATION.fullmatch(text):
            return now + timedelta(seconds=Duration().convert(text, param, ctx))
        try:
            at = datetime.fromisoformat(text).astimezone(UTC)
        except ValueError:
            self.fail(f"{text!r} is no time; write 8h, or 2026-12-01T18:00", param, ctx)
        if at <= now:
            self.fail(f"{text!r} is over; write a time to come, or 8h", param, ctx)
        return at


@click.command(epilog=_EPILOG)
@click.argument("model")
@click.option("--site", "machine", required=True, help="The machine: the name of a site file.")
@click.option("--walltime", required=True, metavar="HH:MM:SS", help="Of one job.")
@click.option("--account", help="The allocation of the machine's that pays.")
@click.option("--queue", help="A queue, partition or QOS.  [default: the machine's]")
@click.option("--nodes", type=click.IntRange(1), default=1, show_default=True, help="Of one job.")
@click.option(
    "--replicas", type=click.IntRange(1, 16), default=1, show_default=True, help="Jobs at once."
)
@click.option(
    "--sharing",
    type=click.Choice(["private", "project", "shared"]),
    default="project",
    show_default=True,
    help="Who may use it: you alone, your project, everybody.",
)
@click.option(
    "--overflow/--no-overflow",
    default=None,
    help="Whether requests of those whose it is may go elsewhere while it is there."
    "  [default: only if it is for everybody]",
)
@click.option(
    "--keep-alive-until", "keep_until", type=Until(), help="Let jobs follow one another until then."
)
@click.option(
    "--idle-stop", "idle_stop_s", type=Duration(), help="End an instance idle for so long."
)
@click.option(
    "--join-within",
    "join_s",
    type=Duration(),
    help="End a job whose instance has not reached the hub so long after it loaded.  [default: 2m]",
)
@click.option(
    "--tensor-parallel", type=click.IntRange(1), help="Processes that divide every matrix."
)
@click.option(
    "--pipeline-parallel",
    type=click.IntRange(1),
    help="Stages of layers.  [default: as planned, or one on each node]",
)
@click.option(
    "--copy-weights",
    "staging",
    type=click.Choice(["auto", "always", "never"]),
    default="auto",
    show_default=True,
    help="To the nodes' own disks: where it pays, or as said.",
)
@click.option("--backend", type=click.Choice(["fabric", "vllm"]), help="What computes.")
@click.option("--max-rows", type=click.IntRange(1), help="Rows of the engine.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), help="Of the weights.")
@click.option(
    "--via",
    type=click.Choice(["login", "endpoint"]),
    help="Submit from here, or through the machine's Globus Compute endpoint."
    "  [default: as its site file says]",
)
@click.option("--force", is_flag=True, help="Launch though the account's balance is too small.")
@click.option("--dry-run", is_flag=True, help="Print the plan and the script; submit nothing.")
@click.option("--wait", "is_waiting", is_flag=True, help="Show how far it is until it is ready.")
@click.option("--module", default="fabric.instance", hidden=True)
@client_options
def launch(
    model: str,
    fabric: Fabric,
    output: Output,
    *,
    via: Literal["login", "endpoint"] | None,
    force: bool,
    dry_run: bool,
    is_waiting: bool,
    module: str,
    **asked: object,
) -> None:
    """Start MODEL in jobs of your own on a machine where you have an account.

    The instances join the pool as yours, and leave it before their walltime ends.
    """
    from fabric.cli import launches
    from fabric.launch.jobs import Order

    version = launches.find_version(fabric, model)
    given = {name: value for name, value in asked.items() if value is not None}
    options = {name: given.pop(name) for name in _ENGINE if name in given}
    order = launches.checked(Order, given | {"model": version, "options": options})
    with launches.prepared(order, fabric, via=via, module=module) as prepared:
        plan, means = prepared.plan, prepared.means
        if means.failed:
            note(f"Warning: {means.unknown}.")
        if dry_run:
            script = prepared.login.render(prepared.record)
            if output.is_json:
                output.json(_record(plan, means) | {"script": script})
            else:
                _print(plan, means, output)
                click.echo()
                click.echo(script.rstrip())
        if not force:
            means.check(plan.site.name)
        if dry_run:
            return
        folder = launches.submit(prepared, fabric)
    if is_waiting:
        launches.wait_ready(folder)
    if output.is_json:
        output.json(launches.describe(folder))
        return
    click.echo(folder.name)
    note(f"`fabric instances` shows how far it is; `fabric stop {folder.name}` ends it.")


def _print(plan: LaunchPlan, means: Means, output: Output) -> None:
    output.facts([(name, value) for name, value in _facts(plan, means) if value])


def _facts(plan: LaunchPlan, means: Means) -> list[tuple[str, str]]:
    order, wait = plan.order, plan.wait
    nodes = "1 node" if order.nodes == 1 else f"{order.nodes} nodes"
    told = f"recorded waits of {wait.num_waits} jobs" if wait.num_waits else "the scheduler says so"
    if wait.p50_s is None and wait.p90_s is None:
        waits = "unknown: the scheduler does not say, and no waits were recorded"
    else:
        waits = f"{_time(wait.p50_s)} (half of such jobs), {_time(wait.p90_s)} (9 of 10); {told}"
    charge = "unknown: the site file does not say"
    if plan.charge is not None:
        charge = f"{plan.charge:,.3g} {plan.unit} at most"
    return [
        ("model", order.model),
        ("machine", f"{plan.site.name} ({plan.site.title})" if plan.site.title else plan.site.name),
        ("jobs", f"{order.replicas} x {nodes} for {order.walltime}"),
        ("queue", plan.queue or "the scheduler's choice"),
        ("account", order.account or "your default there"),
        ("memory", plan.fit.text),
        ("processes", str(plan.division)),
        ("weights", plan.staging.reason),
        ("wait", waits),
        ("load", f"{_time(plan.load_s)}, then ready"),
        ("charge there", f"{charge}, a job"),
        ("balance there", _balance(means)),
        ("left after it", _remains(means)),
        ("charge here", "0 SU: what your own jobs serve is not charged again"),
        ("requests", _users(order)),
        ("kept until", f"{order.keep_until:%Y-%m-%d %H:%M UTC}" if order.keep_until else ""),
    ]


def _users(order: Order) -> str:
    whose = {"private": "your", "project": "your project's", "shared": "everybody's"}
    where = "go nowhere else while it is there" if order.keeps else "may also go elsewhere"
    return f"{whose[order.sharing]} requests for this model {where}"


def _balance(means: Means) -> str:
    if means.balance is None:
        return means.unknown
    return f"{means.balance.available:,.4g} {means.balance.unit} of {means.account}"


def _remains(means: Means) -> str:
    if means.remains is None:
        return means.unknown if means.balance is not None else ""
    jobs = f"when all of it has run, {means.charge:,.4g} {means.unit}s at most"
    short = "" if means.remains >= 0 else "; too little"
    return f"{means.remains:,.4g} {means.unit}s {jobs}{short}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _record(plan: LaunchPlan, means: Means) -> dict[str, object]:
    order: Order = plan.order
    return {
        "order": order.model_dump(mode="json"),
        "scheduler": plan.scheduler,
        "queue": plan.queue,
        "memory": plan.fit.text,
        "weight_bytes": plan.fit.weight_bytes,
        "ranks": list(plan.division.ranks),
        "staging": plan.staging.reason,
        "wait_s": {"p50": plan.wait.p50_s, "p90": plan.wait.p90_s},
        "load_s": plan.load_s,
        "charge": plan.charge,
        "unit": plan.unit,
        "total_charge": means.charge,
        "account": means.account,
        "balance": None if means.balance is None else float(means.balance.available),
        "balance_unit": None if means.balance is None else means.balance.unit,
        "remains": None if means.remains is None else float(means.remains),
        "balance_unknown": means.unknown,
        "charge_usu": 0,
    }
