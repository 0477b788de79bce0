"""What a worker of an endpoint knows from its environment."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from fabric.errors import SettingInvalid

_JOB_IDS = ("SLURM_JOB_ID", "PBS_JOBID")
_TASK_ID = "GC_TASK_UUID"
_MODULE = "FABRIC_INSTANCE_MODULE"
DEFAULT_MODULE = "fabric.instance"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerEnvironment:
    """A worker's place.

    ``job_id`` is the scheduler's, if there is one; ``task_id`` Globus Compute's of the running
    task; ``instance_module`` what an instance is run by (``python -m``), which a site's
    administrator may set in the endpoint's ``worker_init``.
    """

    job_id: str | None = None
    task_id: str | None = None
    instance_module: str = DEFAULT_MODULE


def load_worker(environ: Mapping[str, str] | None = None) -> WorkerEnvironment:
    """Read a worker's environment.

    Args:
        environ: The variables; the process's own by default.

    Raises:
        SettingInvalid: The instance module is not a module's name.
    """
    environ = os.environ if environ is None else environ
    module = environ.get(_MODULE) or DEFAULT_MODULE
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", module):
        raise SettingInvalid(setting=_MODULE, value=module, reason="it is not a module's name")
    return WorkerEnvironment(
        job_id=next((environ[name] for name in _JOB_IDS if environ.get(name)), None),
        task_id=environ.get(_TASK_ID) or None,
        instance_module=module,
    )
