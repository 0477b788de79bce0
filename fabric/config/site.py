"""The schema of a site's file: what a centre offers and how instances are started there."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fabric.errors import SettingInvalid
from fabric.messages import EngineOptions


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class SiteModel(_Frozen):
    """One model version a site runs: its name, where its weights are, and how it is sized there."""

    name: str
    revision: str = "1"
    source: str
    context_tokens: int = Field(ge=1)
    options: EngineOptions = EngineOptions()


class LocalExecutor(_Frozen):
    """Blocks on this machine: Parsl's HighThroughputExecutor with its LocalProvider."""

    kind: Literal["local"] = "local"
    worker_init: str = ""


class Prices(_Frozen):
    """Charges per token in micro-SU."""

    prompt_usu: int = Field(default=10, ge=0)
    cached_prompt_usu: int = Field(default=1, ge=0)
    output_usu: int = Field(default=40, ge=0)


class SiteSpec(_Frozen):
    """A site: a name, what it runs and where."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    title: str = ""
    executor: LocalExecutor = LocalExecutor()
    models: tuple[SiteModel, ...] = ()
    prices: Prices = Prices()


def load_site(path: Path) -> SiteSpec:
    """Read a site's file.

    Raises:
        SettingInvalid: The file is missing, is not YAML, or does not follow the schema.
    """
    try:
        return SiteSpec.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingInvalid(
            setting="site file", value=path, reason=f"it cannot be read as YAML: {error}"
        ) from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise SettingInvalid(
            setting=".".join(map(str, first["loc"])) or "site file",
            value=first["input"],
            reason=first["msg"],
            source=str(path),
        ) from error


def shipped_sites() -> dict[str, Path]:
    """Return the site files that ship with the package, by name."""
    folder = resources.files("fabric.site_configs")
    with resources.as_file(folder) as path:
        return {file.stem: file for file in sorted(path.glob("*.yaml"))}
