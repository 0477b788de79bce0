"""What a job has taken, by its scheduler's own account, and what the machine charges for that."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from pydantic import Field

from fabric.config.system import Queue, System
from fabric.errors import SchedulerFailed
from fabric.launch.jobs.commands import run, try_run
from fabric.launch.jobs.queue import Scheduler
from fabric.messages.wire import Wire

_CLOCK = re.compile(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)")
_NOT_OVER = frozenset({"PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "REQUEUED", "RESIZING"})


class JobUsage(Wire):
    """The nodes that a job had and for how long; ``source`` is who says so."""

    elapsed_s: float = Field(ge=0, allow_inf_nan=False)
    num_nodes: int = Field(ge=1)
    source: str


def get_usage(scheduler: Scheduler, job_id: str) -> JobUsage | None:
    """Ask a scheduler what a job that has ended took; ``None`` while its books are open.

    Raises:
        SchedulerFailed: It does not say.
    """
    match scheduler:
        case "slurm":
            done = try_run("sacct", "-n", "-P", "-X", "-j", job_id, "-o", "State,ElapsedRaw,NNodes")
            if done.returncode == 0:
                return parse_sacct(done.stdout)
            # A cluster that keeps no accounts; the controller remembers its jobs for a while.
            return parse_scontrol_usage(run("scontrol", "-o", "show", "job", job_id))
        case "pbspro":
            return parse_qstat_usage(run("qstat", "-x", "-f", "-F", "json", job_id), job_id)
        case "local":
            return None


def parse_sacct(output: str) -> JobUsage | None:
    """Return what ``sacct -n -P -X -o State,ElapsedRaw,NNodes`` tells of one job.

    Of a job that ran again, which has a line for each time, it is all of them together.
    """
    lines = [line.split("|") for line in output.splitlines() if line.strip()]
    if not lines or any(line[0].split()[0] in _NOT_OVER for line in lines):
        return None
    return JobUsage(
        elapsed_s=sum(float(elapsed) for _, elapsed, _ in lines),
        num_nodes=max(1, *(int(nodes) for *_, nodes in lines)),
        source="sacct",
    )


def parse_scontrol_usage(output: str) -> JobUsage | None:
    """Return what ``scontrol -o show job`` tells of a job."""
    fields = dict(part.split("=", 1) for part in output.split() if "=" in part)
    elapsed_s = to_elapsed_s(fields.get("RunTime", ""))
    if elapsed_s is None or fields.get("JobState", "") in _NOT_OVER:
        return None
    # A job that waits for its nodes has a range of them, such as 1-4.
    nodes = int(re.match(r"\d*", fields.get("NumNodes", ""))[0] or 1)  # type: ignore[index]
    return JobUsage(elapsed_s=elapsed_s, num_nodes=max(1, nodes), source="scontrol")


def parse_qstat_usage(output: str, job_id: str) -> JobUsage | None:
    """Return what ``qstat -x -f -F json`` tells of a job.

    Raises:
        SchedulerFailed: The answer is not JSON.
    """
    try:
        jobs: Mapping[str, Mapping[str, object]] = json.loads(output).get("Jobs", {})
    except ValueError as error:
        reason = "its answer is not JSON"
        raise SchedulerFailed(command="qstat -x -f -F json", reason=reason) from error
    short = job_id.split(".")[0]
    job = next((one for name, one in jobs.items() if name.split(".")[0] == short), {})
    if job.get("job_state") != "F":
        return None
    used, asked = job.get("resources_used"), job.get("Resource_List")
    told = used.get("walltime", "") if isinstance(used, dict) else ""
    nodes = asked.get("nodect", 1) if isinstance(asked, dict) else 1
    # A job that was deleted while it waited has used nothing.
    elapsed_s = to_elapsed_s(str(told)) or 0.0
    return JobUsage(elapsed_s=elapsed_s, num_nodes=max(1, int(nodes)), source="qstat")


def to_elapsed_s(text: str) -> float | None:
    """Return a time such as ``1-02:03:04`` in seconds; ``None`` if it is none."""
    found = _CLOCK.fullmatch(text)
    if found is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def get_charge(
    system: System, queue: Queue | None, *, num_nodes: int, elapsed_s: float
) -> float | None:
    """Return what a machine charges for nodes in its own unit; ``None`` if its file does not say.

    Args:
        system: The machine.
        queue: Where the job ran.
        num_nodes: How many nodes it had.
        elapsed_s: For how long.
    """
    if queue is None or queue.units_per_node_hour is None:
        return None
    least = system.charge.min_hours if system.charge else 0.0
    factor = 1.0 if queue.charge_factor is None else queue.charge_factor
    return queue.units_per_node_hour * factor * num_nodes * max(least, elapsed_s / 3600)
