"""What a batch job knows of itself from its environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEnvironment:
    """A job's place, as its scheduler tells the first node.

    ``node`` is this node's name there; ``node_list`` is Slurm's expression for all of the job's
    nodes, and ``node_file`` names PBS's file of them; ``ends_at`` is in epoch seconds.
    """

    node: str | None = None
    node_list: str | None = None
    node_file: Path | None = None
    ends_at: float | None = None


def load_job(environ: Mapping[str, str] | None = None) -> JobEnvironment:
    """Read a job's environment.

    Args:
        environ: The variables; the process's own by default.
    """
    environ = os.environ if environ is None else environ
    node_file = environ.get("PBS_NODEFILE")
    ends_at = environ.get("SLURM_JOB_END_TIME", "")
    return JobEnvironment(
        node=environ.get("SLURMD_NODENAME") or None,
        node_list=environ.get("SLURM_JOB_NODELIST") or None,
        node_file=Path(node_file) if node_file else None,
        ends_at=float(ends_at) if ends_at.isdecimal() else None,
    )
