"""Jobs through Parsl's providers: one block is one job, and runs one instance."""

from __future__ import annotations

import math
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import fabric
from fabric.config import SiteSpec
from fabric.errors import JobRefused, LaunchImpossible, SettingInvalid
from fabric.launch.jobs.order import Order

if TYPE_CHECKING:
    from parsl.providers.base import ExecutionProvider

WARNING_SHARE = 0.25
"""The part of a job's time that its instance has to finish what it has."""

MAX_WARNING_S = 120
MIN_WARNING_S = 10
_COMMANDS = {"slurm": "sbatch", "pbspro": "qsub"}
_SAFE_PATH = re.compile(r"[\w./+~-]+")


class Submitter(Protocol):
    """Takes jobs to a machine's scheduler and away from it. Calls block for seconds."""

    def submit(self, command: Sequence[str], name: str) -> str:
        """Submit a job that runs a command on its first node; return its id.

        Raises:
            JobRefused: The scheduler does not take it; says what it said.
        """

    def cancel(self, job_id: str) -> None:
        """End a job, if there still is one."""

    def render(self, command: Sequence[str], name: str) -> str:
        """Return the batch script that ``submit`` would hand over, and with which command."""


def get_warning_s(walltime_s: float) -> int:
    """Return how long before its end a job is told, for its instance to drain."""
    return int(min(MAX_WARNING_S, max(MIN_WARNING_S, WARNING_SHARE * walltime_s)))


class ParslSubmitter:
    """A ``Submitter`` over the provider that the site's scheduler needs.

    Args:
        site: The machine's file; its ``endpoint`` says how blocks are started there.
        order: What is asked for.
        queue: Where.
        script_dir: Where scripts and their output go; made if missing.

    Raises:
        LaunchImpossible: Nothing is known of the machine's scheduler.
        SettingInvalid: Parsl's scripts cannot hold the directory's name.
    """

    def __init__(self, site: SiteSpec, order: Order, queue: str | None, script_dir: Path) -> None:
        if not _SAFE_PATH.fullmatch(str(script_dir)):
            raise SettingInvalid(
                setting="state_dir",
                value=str(script_dir),
                reason="Parsl's scripts take letters, digits and . / _ + ~ - in paths only",
            )
        self._site = site
        self._order = order
        self._queue = queue
        self._script_dir = script_dir
        self._provider: ExecutionProvider | None = None

    def submit(self, command: Sequence[str], name: str) -> str:
        """Submit a job. See ``Submitter.submit``."""
        from parsl.providers.errors import SubmitException

        taken_by = _COMMANDS.get(self._scheduler)
        if taken_by is not None and shutil.which(taken_by) is None:
            reason = f"its {taken_by} is not here; run this on its login node, or --via endpoint"
            raise LaunchImpossible(param="machine", value=self._order.machine, reason=reason)
        provider = self._get()
        try:
            job_id = provider.submit(f"exec {shlex.join(command)}", 1, name)
        except SubmitException as error:
            said = (error.stderr or error.stdout or str(error)).strip()
            reason = " ".join(said.split()) or "it gave no reason"
            raise JobRefused(machine=self._site.name, reason=reason.rstrip(".")) from error
        if job_id is None:  # PBSProProvider returns it so where qsub fails
            raise JobRefused(machine=self._site.name, reason="it gave no job id")
        return str(job_id)

    def cancel(self, job_id: str) -> None:
        """End a job. See ``Submitter.cancel``."""
        provider = self._get()
        # A launcher that was started again has not submitted the job itself.
        provider.resources.setdefault(job_id, {"job_id": job_id})
        provider.cancel([job_id])

    def render(self, command: Sequence[str], name: str) -> str:
        """Return the batch script. See ``Submitter.render``."""
        provider = self._get()
        if not hasattr(provider, "execute_wait"):  # of this machine: a script with nothing to ask
            return f"{provider.worker_init}\nexec {shlex.join(command)}\n"
        scripts: list[str] = []

        def read_script(line: str, *_: object, **__: object) -> tuple[int, str, str]:
            *words, path = line.split()
            script = Path(path).read_text().rstrip()
            scripts.append(f"{script}\n\n# Submitted by: {' '.join(words)} {Path(path).name}\n")
            return 1, "", "nothing is submitted"

        # The provider writes the script as it does for a submission; only its command is not run.
        provider.execute_wait = read_script
        try:
            provider.submit(f"exec {shlex.join(command)}", 1, name)
        except Exception:
            if not scripts:
                raise
        finally:
            del provider.execute_wait
        return scripts[0]

    def _get(self) -> Any:
        if self._provider is None:
            self._script_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._provider = self._build()
            self._provider.script_dir = str(self._script_dir)
        return self._provider

    @property
    def _scheduler(self) -> str:
        endpoint, system = self._site.endpoint, self._site.system
        return endpoint.scheduler if endpoint else system.scheduler if system else "none"

    def _build(self) -> ExecutionProvider:
        # Parsl takes more than a second to import.
        from parsl.launchers import SimpleLauncher
        from parsl.providers import LocalProvider, PBSProProvider, SlurmProvider

        endpoint, order = self._site.endpoint, self._order
        system = self._site.system
        common: dict[str, Any] = {
            "launcher": SimpleLauncher(),
            "init_blocks": 0,
            "max_blocks": 1,
            "worker_init": _get_worker_init(endpoint.worker_init if endpoint else ""),
        }
        job = common | {
            "nodes_per_block": order.nodes,
            "walltime": _whole_minutes(order.walltime_s),
            "cmd_timeout": endpoint.cmd_timeout_s if endpoint else 60,
        }
        own_options = endpoint.scheduler_options if endpoint else ""
        account = order.account or (endpoint.account if endpoint else None)
        queue = system.queues.get(self._queue) if system and self._queue else None
        warning_s = get_warning_s(order.walltime_s)
        match self._scheduler:
            case "local":
                return LocalProvider(**common)
            case "slurm":
                is_qos = queue is not None and queue.kind == "qos"
                # A job that Slurm ran again by itself would come back as an instance that is gone.
                signal = f"#SBATCH --signal=B:USR1@{warning_s}\n#SBATCH --no-requeue\n"
                return SlurmProvider(
                    partition=None if is_qos else self._queue,
                    qos=self._queue if is_qos else None,
                    account=account,
                    exclusive=endpoint.exclusive if endpoint else True,
                    scheduler_options=_without(own_options, "--qos" if is_qos else "") + signal,
                    **job,
                )
            case "pbspro":
                return PBSProProvider(
                    queue=self._queue,
                    account=account,
                    cpus_per_node=(endpoint.cpus_per_node if endpoint else None) or 1,
                    select_options=endpoint.select_options if endpoint else "",
                    scheduler_options=own_options,
                    **job,
                )
        reason = "its file does not say which scheduler it has"
        raise LaunchImpossible(param="machine", value=order.machine, reason=reason)


def _get_worker_init(own: str) -> str:
    """Return the shell lines before the command: the site's, then this very Python's paths."""
    bin_dir = Path(sys.executable).parent
    root = Path(fabric.__file__).parents[1]
    paths = f"export PYTHONPATH={root}:$PYTHONPATH PATH={bin_dir}:$PATH"
    # A module that is not there must end the job, not let it run without.
    return f"set -e\n{own}\n{paths}" if own.strip() else paths


def _whole_minutes(walltime_s: int) -> str:
    """Return a walltime as schedulers count it: a started minute is a whole one."""
    minutes = math.ceil(walltime_s / 60)
    return f"{minutes // 60:02}:{minutes % 60:02}:00"


def _without(options: str, option: str) -> str:
    """Return directives without those of one option, which the order sets."""
    lines = options.splitlines(keepends=True)
    return "".join(line for line in lines if not option or f" {option}" not in line)
