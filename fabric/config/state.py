"""The state directory: what a federation on this machine keeps between commands."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError


class ProcessRecord(BaseModel):
    """A process we started; ``started_at`` (epoch seconds) tells it from a later one of its pid."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pid: int
    started_at: float


class Federation(BaseModel):
    """What ``fabric up`` started, and how to reach it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_url: str
    api_key: str
    model: str
    hub: ProcessRecord
    sites: dict[str, ProcessRecord]


@dataclass(frozen=True, slots=True)
class StateDir:
    """Paths under one directory, which only its owner may read."""

    path: Path

    @property
    def database_url(self) -> str:
        """The SQLAlchemy URL of the hub's SQLite file."""
        return f"sqlite:///{self.path / 'fabric.db'}"

    @property
    def lock_path(self) -> Path:
        """The file a running ``fabric up`` or ``down`` locks."""
        return self.path / "lock"

    @property
    def federation_path(self) -> Path:
        """The record of what runs."""
        return self.path / "federation.json"

    @property
    def login_path(self) -> Path:
        """Where Globus logins are kept."""
        return self.path / "login.db"

    @property
    def launches_dir(self) -> Path:
        """Where the user's own launches are kept."""
        return self.path / "launches"

    def log_path(self, name: str) -> Path:
        """Return the log file of a process."""
        return self.path / "logs" / f"{name}.log"

    def site_dir(self, site: str) -> Path:
        """Return where a site keeps its run directories."""
        return self.path / "sites" / site

    def create(self) -> None:
        """Make the directories, private to their owner."""
        for path in (self.path, self.path / "logs", self.path / "sites"):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def federation(self) -> Federation | None:
        """Return what is recorded as running, or ``None``; an unreadable record counts as none."""
        try:
            return Federation.model_validate_json(self.federation_path.read_bytes())
        except (OSError, ValidationError):
            return None

    def write_federation(self, federation: Federation) -> None:
        """Record what runs, atomically and readable by the owner alone (it holds a key)."""
        handle, name = tempfile.mkstemp(dir=self.path, prefix=".federation-")
        with os.fdopen(handle, "w") as file:
            file.write(federation.model_dump_json(indent=2))
        Path(name).replace(self.federation_path)

    def clear_federation(self) -> None:
        """Forget what ran."""
        self.federation_path.unlink(missing_ok=True)
