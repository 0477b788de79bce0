"""Where large payloads are kept: the data that configures a store."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator

from fabric.errors import SettingInvalid

STORE_FILE = "store.json"


class _Store(BaseModel):
    """What every store has.

    Both ends know it under the same ``name``, which no other store has. ``ttl_s`` is how long an
    object is kept; ``max_bytes`` the largest the store takes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    ttl_s: float = Field(default=86_400.0, gt=0.0)


class FileStore(_Store):
    """A directory on a file system that both ends mount."""

    kind: Literal["file"]
    directory: Path
    max_bytes: int = Field(default=2**32, ge=1)

    @field_validator("directory")
    @classmethod
    def _absolute(cls, directory: Path) -> Path:
        if not directory.expanduser().is_absolute():
            raise ValueError("the directory is an absolute path, or begins with ~")
        return directory


class RedisStore(_Store):
    """A Redis server; Redis itself takes values up to 512 MiB."""

    kind: Literal["redis"]
    host: str = Field(min_length=1)
    port: int = Field(ge=1, le=65_535)
    max_bytes: int = Field(default=2**29, ge=1, le=2**29)


class EndpointStore(_Store):
    """ProxyStore endpoints, of which one is reachable from here.

    ``proxystore_dir`` is where their configurations are; ``None`` is ProxyStore's own default.
    """

    kind: Literal["endpoint"]
    endpoints: tuple[UUID, ...] = Field(min_length=1)
    proxystore_dir: Path | None = None
    max_bytes: int = Field(default=100_000_000, ge=1)


StoreConfig = Annotated[FileStore | RedisStore | EndpointStore, Field(discriminator="kind")]

_adapter: TypeAdapter[StoreConfig] = TypeAdapter(StoreConfig)


def load_store(run_dir: Path) -> StoreConfig | None:
    """Return the store configured for what runs in a directory, or ``None`` without one.

    Raises:
        SettingInvalid: Its file cannot be read or does not follow the schema.
    """
    path = run_dir / STORE_FILE
    try:
        return _adapter.validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise SettingInvalid(setting="store", value=path, reason=f"{error}") from error


def save_store(config: StoreConfig, run_dir: Path) -> None:
    """Configure the store of what runs in a directory: atomically, readable by the owner alone."""
    run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=run_dir, prefix=f".{STORE_FILE}-")
    with os.fdopen(handle, "w") as file:
        file.write(config.model_dump_json(indent=2))
    Path(name).replace(run_dir / STORE_FILE)
