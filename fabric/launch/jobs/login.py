"""A machine's login node: where jobs are submitted, looked at and ended."""

from __future__ import annotations

import asyncio
import re
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from fabric.config import SiteSpec
from fabric.errors import FabricError, JobRefused, LaunchImpossible, SchedulerFailed
from fabric.launch.balances import Balance, get_balance_source
from fabric.launch.jobs.accounting import JobUsage, get_usage
from fabric.launch.jobs.plan import ask_here, get_command, get_scheduler
from fabric.launch.jobs.queue import JobPhase, JobState, get_states
from fabric.launch.jobs.records import LaunchFolder, LaunchRecord, is_launch_name
from fabric.launch.jobs.submit import ParslSubmitter
from fabric.messages import InstanceSpec, InstanceStatus
from fabric.messages.wire import Wire

LOG_TAIL_BYTES = 65_536
_INSTANCE = re.compile(r"[\w-]{1,80}")


class Sight(Wire):
    """A job at one moment: as its scheduler sees it, as its instance says, and what it took."""

    state: JobState
    status: InstanceStatus | None = None
    usage: JobUsage | None = None


class LoginNode(Protocol):
    """A machine's login node. Calls block for seconds; one thread at a time makes them."""

    fastest_poll_s: float
    """How often it is worth looking."""

    def estimate_wait(self, scheduler: str, options: Mapping[str, object]) -> float | None:
        """Return the wait that a scheduler expects of a job, in seconds, if it says so.

        Raises:
            FabricError: It was not asked, or does not answer.
        """

    def balance(self, site: SiteSpec, account: str, token: str | None = None) -> Balance:
        """Return what an account has left, asked of the centre. It may be called from another
        thread, beside what the one does.

        Raises:
            SettingInvalid: The site's file does not say how to ask.
            BalanceUnavailable: The centre does not say.
        """

    def render(self, record: LaunchRecord) -> str:
        """Return the batch script of a launch's first job, with names in capitals for its own."""

    def submit(self, record: LaunchRecord, spec: InstanceSpec) -> str:
        """Submit a job for an instance and return its id; the same again returns the same id.

        Raises:
            JobRefused: The scheduler does not take it.
            DispatchError: It is not known whether it was submitted.
        """

    def look(self, record: LaunchRecord, jobs: Mapping[str, str]) -> Mapping[str, Sight]:
        """Return how jobs are, by instance; what ended jobs took is there once it is known.

        Args:
            record: The launch.
            jobs: The ids of its jobs, by instance.

        Raises:
            FabricError: The scheduler does not answer; the jobs may go on all the same.
        """

    def cancel(self, record: LaunchRecord, instance: str, job_id: str | None) -> None:
        """End a job; one that was submitted and whose id is not known ends when it starts."""

    def read_logs(self, record: LaunchRecord, instance: str) -> Mapping[str, str]:
        """Return the ends of what an instance and its job have written, by file name."""

    def close(self) -> None:
        """Leave. Twice is harmless."""


class LocalLogin:
    """The login node that this process runs on.

    Args:
        root: Where launches are kept.
    """

    fastest_poll_s = 0.5

    def __init__(self, root: Path) -> None:
        self._root = root
        self._submitters: dict[str, ParslSubmitter] = {}

    def estimate_wait(self, scheduler: str, options: Mapping[str, object]) -> float | None:
        """Return the wait that the scheduler expects. See ``LoginNode.estimate_wait``."""
        return ask_here(scheduler, options)

    def balance(self, site: SiteSpec, account: str, token: str | None = None) -> Balance:
        """Return what an account has left. See ``LoginNode.balance``."""
        return asyncio.run(get_balance_source(site, token).balance(account))

    def render(self, record: LaunchRecord) -> str:
        """Return the batch script. See ``LoginNode.render``."""
        folder = self._root / "LAUNCH"
        command = get_command(
            record.order,
            record.ranks,
            folder / "jobs" / "INSTANCE.spec.json",
            folder / "jobs" / "INSTANCE.log",
            record.module,
        )
        with tempfile.TemporaryDirectory(prefix="fabric-dry-run-") as scratch:
            submitter = ParslSubmitter(record.site, record.order, record.queue, Path(scratch))
            script = submitter.render(command, "fabric-LAUNCH")
            return script.replace(scratch, str(folder / "scripts"))

    def submit(self, record: LaunchRecord, spec: InstanceSpec) -> str:
        """Submit a job. See ``LoginNode.submit``."""
        instance = spec.launch.instance
        folder = self._folder(record, instance)
        with folder.submission(instance) as submission:
            if submission.job_id is not None:
                return submission.job_id
            if submission.begun:
                reason = "it was submitted before, and whoever did was killed before it had the id"
                raise JobRefused(machine=record.order.machine, reason=reason)
            full = spec.model_copy(update={"status_path": str(folder.status_path(instance))})
            if folder.launch() is None:
                folder.write_launch(record)  # of a launcher elsewhere: the job reads it
            command = get_command(
                record.order,
                record.ranks,
                folder.write_spec(full),
                folder.instance_log(instance),
                record.module,
            )
            submission.begin()
            try:
                submitter = self._submitter(record, folder)
                return submission.end(submitter.submit(command, f"fabric-{record.name}"))
            except FabricError:
                folder.forget_secrets(instance)
                raise

    def look(self, record: LaunchRecord, jobs: Mapping[str, str]) -> Mapping[str, Sight]:
        """Return how jobs are. See ``LoginNode.look``."""
        folder, scheduler = self._folder(record), get_scheduler(record.site)
        states = get_states(scheduler, list(jobs.values()))
        sights = {}
        for instance, job_id in jobs.items():
            self._folder(record, instance)
            state, usage = states[job_id], None
            if state.phase is JobPhase.ENDED or state.phase is JobPhase.UNKNOWN:
                folder.forget_secrets(instance)
                with suppress(SchedulerFailed):
                    usage = get_usage(scheduler, job_id)
            status = folder.status(instance)
            sights[instance] = Sight(state=state, status=status and _told(status), usage=usage)
        return sights

    def cancel(self, record: LaunchRecord, instance: str, job_id: str | None) -> None:
        """End a job. See ``LoginNode.cancel``."""
        folder = self._folder(record, instance)
        if job_id is not None:
            self._submitter(record, folder).cancel(job_id)
        else:
            folder.forget_secrets(instance)

    def read_logs(self, record: LaunchRecord, instance: str) -> Mapping[str, str]:
        """Return the ends of the logs. See ``LoginNode.read_logs``."""
        folder = self._folder(record, instance)
        paths = [*sorted(folder.scripts.glob("*.std*"))[-2:], folder.instance_log(instance)]
        return {path.name: text for path in paths if (text := _read_tail(path))}

    def close(self) -> None:
        """Do nothing."""

    def _folder(self, record: LaunchRecord, instance: str = "none") -> LaunchFolder:
        if not is_launch_name(record.name):
            reason = "a launch's name is l- and eight hexadecimal digits"
            raise LaunchImpossible(param="name", value=record.name, reason=reason)
        if not _INSTANCE.fullmatch(instance):
            reason = "an instance's name has letters, digits and _ - only"
            raise LaunchImpossible(param="instance", value=instance, reason=reason)
        return LaunchFolder(self._root / record.name)

    def _submitter(self, record: LaunchRecord, folder: LaunchFolder) -> ParslSubmitter:
        if record.name not in self._submitters:
            self._submitters[record.name] = ParslSubmitter(
                record.site, record.order, record.queue, folder.scripts
            )
        return self._submitters[record.name]


def _told(status: InstanceStatus) -> InstanceStatus:
    """Return a status without what opens the direct route, which need not travel."""
    return status.model_copy(update={"guest_token": None})


def _read_tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - LOG_TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""
