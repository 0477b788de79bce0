"""What the registered functions keep on site: ``{run_dir}/instances``, its owner's alone.

Of each instance there are its log, which stays, and while its worker runs it: the status it writes
of itself, a record of where that worker is, and, once somebody asked it to leave, a request to
stop. Nodes of one site may share the directory.
"""

from __future__ import annotations

import os
import re
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

import psutil
from pydantic import ValidationError

from fabric.errors import AlreadyStarted, RequestInvalid, SettingInvalid
from fabric.messages import InstanceStatus
from fabric.messages.wire import Wire

_RUN_DIR = re.compile(r"(?:~|/)[^\0-\x1f]{0,1023}")
_Record = TypeVar("_Record", bound=Wire)

_INSTANCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")


class Place(Wire):
    """Which worker runs an instance; ``started_at`` (epoch seconds) tells it from a later one."""

    host: str
    job_id: str | None
    pid: int
    started_at: float

    @property
    def here(self) -> bool:
        """Whether the worker is on this machine."""
        return self.host == socket.gethostname()

    @property
    def gone(self) -> bool:
        """Whether the worker has certainly ended; of other machines nothing is certain."""
        if not self.here:
            return False
        try:
            worker = psutil.Process(self.pid)
            same = abs(worker.create_time() - self.started_at) < 1.0
            return not same or worker.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalInstance:
    """An instance of this site; ``status`` is ``None`` until it has said something."""

    instance: str
    place: Place
    status: InstanceStatus | None


class RunDir:
    """The instances of a run directory.

    Args:
        run_dir: An absolute path, or one in the home directory (``~/…``).

    Raises:
        RequestInvalid: It is neither, or has ``..`` in it.
    """

    def __init__(self, run_dir: str) -> None:
        if not _RUN_DIR.fullmatch(str(run_dir)) or ".." in Path(run_dir).parts:
            reason = "it must be an absolute path or begin with ~/, without '..'"
            raise RequestInvalid(param="run_dir", value=run_dir, reason=reason)
        self.path = Path(run_dir).expanduser()
        self._instances = self.path / "instances"

    def create(self) -> None:
        """Make the directory of the instances, and private what others could look into.

        Raises:
            SettingInvalid: It cannot be made, or is not this user's.
        """
        try:
            self._instances.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = self._instances.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
                raise self._unusable("it is a link, or another user's")
            if stat.S_IMODE(found.st_mode) != 0o700:
                self._instances.chmod(0o700)
        except OSError as error:
            raise self._unusable(str(error)) from error

    def status_path(self, instance: str) -> Path:
        """Return where an instance writes its status."""
        return self._path(instance, "json")

    def log_path(self, instance: str) -> Path:
        """Return where an instance's output goes."""
        return self._path(instance, "log")

    @contextmanager
    def claim(self, instance: str, job_id: str | None) -> Iterator[BinaryIO]:
        """Yield an instance's new log; while the block lasts, this process is its worker.

        Raises:
            AlreadyStarted: The instance was claimed before, here or on another machine.
            SettingInvalid: The files cannot be written.
        """
        log_path = self.log_path(instance)
        place = Place(
            host=socket.gethostname(),
            job_id=job_id,
            pid=os.getpid(),
            started_at=psutil.Process().create_time(),
        )
        try:
            log = open(log_path, "xb", opener=_open_private)  # noqa: SIM115
        except FileExistsError as error:
            raise AlreadyStarted(instance=instance, log_path=str(log_path)) from error
        except OSError as error:
            raise self._unusable(str(error)) from error
        try:
            with log:
                self._write(instance, "place", place.model_dump_json())
                yield log
        finally:
            self._forget(instance)

    def ask_to_stop(self, instance: str) -> None:
        """Leave word for the worker of an instance, wherever it is, that it shall stop."""
        self._write(instance, "stop", "")

    def stop_asked(self, instance: str) -> bool:
        """Return whether an instance shall stop."""
        return self._path(instance, "stop").exists()

    def instances(self) -> list[LocalInstance]:
        """Return the instances whose workers run, and remove what dead workers left."""
        found = []
        for path in sorted(self._instances.glob("*.place")):
            one = self.find(path.stem)
            if one is not None:
                found.append(one)
        return found

    def find(self, instance: str) -> LocalInstance | None:
        """Return an instance whose worker runs."""
        place = _read(self._path(instance, "place"), Place)
        if place is None:
            return None
        if place.gone:
            self._forget(instance)
            return None
        status = _read(self.status_path(instance), InstanceStatus)
        return LocalInstance(instance=instance, place=place, status=status)

    def read_status(self, instance: str) -> InstanceStatus | None:
        """Return what an instance last wrote of itself."""
        return _read(self.status_path(instance), InstanceStatus)

    def _path(self, instance: str, suffix: str) -> Path:
        if not _INSTANCE.fullmatch(str(instance)):
            reason = "an instance's id is made of letters, digits, - and _"
            raise RequestInvalid(param="instance", value=instance, reason=reason)
        return self._instances / f"{instance}.{suffix}"

    def _write(self, instance: str, suffix: str, text: str) -> None:
        try:
            with open(self._path(instance, suffix), "w", opener=_open_private) as file:
                file.write(text)
        except OSError as error:
            raise self._unusable(str(error)) from error

    def _forget(self, instance: str) -> None:
        for suffix in ("place", "stop", "json"):
            self._path(instance, suffix).unlink(missing_ok=True)

    def _unusable(self, reason: str) -> SettingInvalid:
        return SettingInvalid(setting="run_dir", value=str(self._instances), reason=reason)


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


def _read(path: Path, model: type[_Record]) -> _Record | None:
    try:
        return model.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
