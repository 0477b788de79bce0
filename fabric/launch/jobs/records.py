"""What is kept of launches on disk, so that whoever launched finds their jobs again.

One folder a launch, its owner's alone: ``launch.json``, and for each job a record, the instance's
spec (which has its token), what the instance says of itself, and its log.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Literal, TypeVar

from pydantic import ValidationError

from fabric.config import SiteSpec
from fabric.errors import NotFound, RequestInvalid
from fabric.launch.jobs.accounting import JobUsage
from fabric.launch.jobs.order import Order
from fabric.messages import InstanceSpec, InstanceState, InstanceStatus
from fabric.messages.wire import Wire

_NAME = re.compile(r"l-[0-9a-f]{8}")
_Record = TypeVar("_Record", bound=Wire)


Via = Literal["login", "endpoint"]


class LaunchRecord(Wire):
    """A launch: what was asked for and where.

    ``via`` says where the launcher is: on the login node, or elsewhere and at the machine's
    endpoint there. ``ranks`` counts the processes on each node of a job. ``module`` is what its
    jobs run by ``python -m``; ``stop`` says that its owner wants it to end.
    """

    name: str
    order: Order
    site: SiteSpec
    queue: str | None
    hub_url: str
    via: Via = "login"
    ranks: tuple[int, ...] = (1,)
    module: str = "fabric.instance"
    created_at: datetime
    state: InstanceState = InstanceState.PENDING
    detail: str = ""
    stop: bool = False
    ended_at: datetime | None = None


class JobRecord(Wire):
    """A job: one generation of one replica.

    ``job_id`` is ``None`` from the moment before it is submitted until the scheduler has answered.
    ``unseen`` says why nobody can see how it is, while that is so. ``deadline_at`` is when its
    walltime ends, known once it runs. ``usage`` is what it took and
    ``charge`` what the machine asks for that in its own ``unit``, once it has ended; ``is_told``
    says that the hub has that in its books.
    """

    instance: str
    replica: int
    generation: int
    job_id: str | None = None
    state: InstanceState = InstanceState.PENDING
    detail: str = ""
    unseen: str = ""
    submitted_at: datetime
    started_at: datetime | None = None
    deadline_at: datetime | None = None
    ready_at: datetime | None = None
    ended_at: datetime | None = None
    usage: JobUsage | None = None
    charge: float | None = None
    unit: str = ""
    is_told: bool = False

    @property
    def open(self) -> bool:
        """Whether it has not ended."""
        return self.ended_at is None

    @property
    def remark(self) -> str:
        """What is to be said of it."""
        return (self.open and self.unseen) or self.detail


def is_launch_name(text: str) -> bool:
    """Return whether a text is a launch's name: nothing else becomes part of a path."""
    return _NAME.fullmatch(text) is not None


@dataclass(slots=True)
class Submission:
    """Whether a job's submission has begun, and its id once the scheduler has told it."""

    begun: bool
    job_id: str | None
    _file: IO[str]

    def begin(self) -> None:
        """Note that the scheduler is asked now."""
        self._write("begun")

    def end(self, job_id: str) -> str:
        """Note and return what the scheduler has told."""
        self._write(job_id)
        return job_id

    def _write(self, line: str) -> None:
        self._file.write(f"{line}\n")
        self._file.flush()
        os.fsync(self._file.fileno())


class LaunchFolder:
    """The folder of one launch.

    Args:
        path: Where it is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, root: Path) -> LaunchFolder:
        """Make the folder of a new launch under ``root``."""
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = root / f"l-{secrets.token_hex(4)}"
        path.mkdir(mode=0o700)
        (path / "jobs").mkdir(mode=0o700)
        return cls(path)

    @classmethod
    def find(cls, root: Path, name: str) -> LaunchFolder:
        """Return the folder of a launch by its name or the beginning of it.

        Raises:
            NotFound: There is none.
            RequestInvalid: Several begin so.
        """
        found = [one for one in cls.all(root) if name and one.name.startswith(name)]
        if not found:
            raise NotFound(kind="launch", name=name)
        if len(found) > 1:
            names = ", ".join(one.name for one in found)
            reason = f"several launches begin so ({names}); give more of the name"
            raise RequestInvalid(param="launch", value=name, reason=reason)
        return found[0]

    @classmethod
    def all(cls, root: Path) -> list[LaunchFolder]:
        """Return the folders of all launches, oldest first."""
        folders = [cls(path) for path in root.glob("l-*") if _NAME.fullmatch(path.name)]
        known = [(record.created_at, folder) for folder in folders if (record := folder.launch())]
        return [folder for _, folder in sorted(known, key=lambda pair: pair[0])]

    @property
    def name(self) -> str:
        """The launch's name."""
        return self.path.name

    @property
    def scripts(self) -> Path:
        """Where batch scripts and what they print go."""
        return self.path / "scripts"

    @property
    def manifests(self) -> Path:
        """Where the digests of weights are kept, for all launches."""
        return self.path.parent / "manifests"

    @property
    def log_path(self) -> Path:
        """Where the process that watches the launch writes."""
        return self.path / "launcher.log"

    def launch(self) -> LaunchRecord | None:
        """Return the launch's record; ``None`` if it cannot be read."""
        return _read(self.path / "launch.json", LaunchRecord)

    def is_deleted(self) -> bool:
        """Return whether somebody has deleted the folder; a file system that is away has not."""
        return self.path.parent.exists() and not self.path.exists()

    def write_launch(self, record: LaunchRecord) -> None:
        """Keep the launch's record."""
        self._write("launch.json", record.model_dump_json(indent=1))

    def jobs(self) -> list[JobRecord]:
        """Return the jobs, oldest first."""
        paths = (self.path / "jobs").glob("*.job.json")
        records = filter(None, (_read(path, JobRecord) for path in paths))
        return sorted(records, key=lambda one: (one.submitted_at, one.replica))

    def write_job(self, record: JobRecord) -> None:
        """Keep a job's record."""
        self._write(f"jobs/{record.instance}.job.json", record.model_dump_json(indent=1))

    def write_spec(self, spec: InstanceSpec) -> Path:
        """Keep what a job's instance is given, for the job to read."""
        name = f"jobs/{spec.launch.instance}.spec.json"
        self._write(name, spec.model_dump_json())
        return self.path / name

    @contextmanager
    def submission(self, instance: str) -> Iterator[Submission]:
        """Yield what is known of a job's submission, to one process at a time."""
        jobs = self.path / "jobs"
        jobs.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (jobs / f"{instance}.submission").open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            _, *told = file.read().split() or [""]
            yield Submission(bool(file.tell()), told[0] if told else None, file)

    def status_path(self, instance: str) -> Path:
        """Return where an instance writes its status."""
        return self.path / "jobs" / f"{instance}.json"

    def status(self, instance: str) -> InstanceStatus | None:
        """Return what an instance last said of itself."""
        return _read(self.status_path(instance), InstanceStatus)

    def instance_log(self, instance: str) -> Path:
        """Return where an instance's output goes."""
        return self.path / "jobs" / f"{instance}.log"

    def best_log(self, instance: str | None) -> Path:
        """Return where to look for why a job failed: its instance's log, its script's, ours."""
        own = [self.instance_log(instance)] if instance else []
        scripts = sorted(self.scripts.glob("*.stderr"), reverse=True)
        return next(
            (path for path in (*own, *scripts) if path.exists() and path.stat().st_size),
            self.log_path,
        )

    def forget_secrets(self, instance: str) -> None:
        """Remove what holds the token of an instance that has ended."""
        (self.path / "jobs" / f"{instance}.spec.json").unlink(missing_ok=True)

    @contextmanager
    def watched(self, inherited: int | None = None) -> Iterator[int | None]:
        """Yield the lock of the only process that watches the launch; ``None``: another has it.

        Args:
            inherited: The lock, a file descriptor, as whoever started this process had it.
        """
        path = self.path / "lock"
        with path.open("a") if inherited is None else os.fdopen(inherited, "a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
                return
            yield lock.fileno()

    def is_watched(self) -> bool:
        """Return whether some process watches the launch."""
        with self.watched() as lock:
            return lock is None

    def _write(self, name: str, text: str) -> None:
        write_whole(self.path / name, text)


def write_whole(path: Path, text: str) -> None:
    """Write a file, whole or not at all, for its owner alone."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    with os.fdopen(handle, "w") as file:
        file.write(text)
    Path(temporary).replace(path)


def _read(path: Path, model: type[_Record]) -> _Record | None:
    try:
        return model.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
