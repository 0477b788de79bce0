"""Adapters: a project's own low-rank changes of a model, as PEFT saves them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fabric.errors import AdapterInvalid
from fabric.sdk.records import Record

if TYPE_CHECKING:
    from fabric.sdk.transport import Transport

ADAPTERS_PATH = "/v1/fabric/adapters"
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter(Record):
    """An adapter of the caller's project, made for the version ``model`` (``name@revision``).

    ``rank`` is the largest of its layers; ``created_at`` is ISO 8601 in UTC.
    """

    name: str
    model: str
    digest: str
    num_bytes: int
    rank: int
    num_layers: int
    created_at: str


def name_of(path: Path) -> str:
    """Return what an adapter is called whose directory this is."""
    return path.absolute().name


async def add(transport: Transport, path: Path, *, name: str, model: str) -> Adapter:
    """Upload what PEFT saved. See ``Fabric.add_adapter``."""
    try:
        with (path / CONFIG_FILE).open("rb") as config, (path / WEIGHTS_FILE).open("rb") as weights:
            files = {"config": (CONFIG_FILE, config), "weights": (WEIGHTS_FILE, weights)}
            form = {"name": name, "model": model}
            return Adapter.from_reply(await transport.upload(ADAPTERS_PATH, files, form))
    except OSError as error:
        pickled = (path / "adapter_model.bin").exists()
        remedy = "; save it with save_pretrained(..., safe_serialization=True)" if pickled else ""
        raise AdapterInvalid(adapter=name, reason=f"{error}{remedy}") from error
