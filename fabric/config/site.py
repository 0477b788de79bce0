"""The schema of a site's file: what a centre offers and how instances are started there."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal, Self
from uuid import UUID

import yaml
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator
from pydantic_core import ErrorDetails

from fabric.config.endpoint import EndpointSpec
from fabric.config.settings import user_config_path
from fabric.config.stores import StoreConfig
from fabric.config.system import System, check_endpoint_fits
from fabric.errors import SettingInvalid
from fabric.messages import MODEL_NAME, MODEL_VERSION, SITE_NAME, EngineOptions


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class SiteModel(_Frozen):
    """One model version a site runs: its name, where its weights are, and how it is sized there."""

    name: str = Field(pattern=f"^{MODEL_NAME}$")
    revision: str = Field(default="1", pattern=f"^{MODEL_VERSION}$")
    source: str
    context_tokens: int = Field(ge=1)
    options: EngineOptions = EngineOptions()


class LocalExecutor(_Frozen):
    """Blocks on this machine: Parsl's HighThroughputExecutor with its LocalProvider."""

    kind: Literal["local"] = "local"
    worker_init: str = ""


class ComputeExecutor(_Frozen):
    """Blocks behind a Globus Compute endpoint, started by the registered functions.

    ``channel`` says how requests reach the site's instances: ``session`` when its nodes can dial
    the hub, ``compute`` when all they can reach is Globus Compute.
    """

    kind: Literal["globus-compute"]
    endpoint_id: UUID
    config: dict[str, JsonValue] = {}
    channel: Literal["session", "compute"] = "session"
    functions: dict[str, UUID] = {}
    run_dir: str = Field(default="~/.fabric", min_length=1)


_TAGS = ("local", "globus-compute")
"""Pydantic names the member of a union in an error's location; the file has no such level."""

Executor = Annotated[LocalExecutor | ComputeExecutor, Field(discriminator="kind")]


class Prices(_Frozen):
    """Charges per token in micro-SU; of programs also per byte in and out, and per second."""

    prompt_usu: int = Field(default=10, ge=0)
    cached_prompt_usu: int = Field(default=1, ge=0)
    output_usu: int = Field(default=40, ge=0)
    hook_in_usu: Decimal = Field(default=Decimal("0.001"), ge=0)
    hook_out_usu: Decimal = Field(default=Decimal("0.01"), ge=0)
    device_usu: Decimal = Field(default=Decimal(1000), ge=0)


class SiteSpec(_Frozen):
    """A site: a name, what it runs and where.

    ``endpoint`` describes the Globus Compute endpoint an administrator runs there, and ``store``
    where results too large for the service are kept; ``fabric-admin endpoint`` installs both, and
    nothing else reads them. ``system`` is what is known of the machine.
    """

    name: str = Field(pattern=f"^{SITE_NAME}$")
    title: str = ""
    system: System | None = None
    executor: Executor = LocalExecutor()
    endpoint: EndpointSpec | None = None
    store: StoreConfig | None = None
    models: tuple[SiteModel, ...] = ()
    prices: Prices = Prices()

    @model_validator(mode="after")
    def _fits_system(self) -> Self:
        if self.system and self.endpoint:
            check_endpoint_fits(self.system, self.endpoint)
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What is wrong in a file: the field, its value, and why it cannot be used."""

    field: str
    value: object
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteFile:
    """A site's file that is found by name: one that ships, or the user's own."""

    name: str
    path: Path
    is_own: bool


def load_site(path: Path) -> SiteSpec:
    """Read a site's file.

    Raises:
        SettingInvalid: The file is missing, is not YAML, or does not follow the schema.
    """
    spec, problems = inspect_site(path)
    if spec is not None:
        return spec
    first, source = problems[0], "" if problems[0].value is path else str(path)
    raise SettingInvalid(setting=first.field, value=first.value, reason=first.reason, source=source)


def inspect_site(path: Path) -> tuple[SiteSpec | None, tuple[Problem, ...]]:
    """Return what a file says, or everything that is wrong in it."""
    try:
        return SiteSpec.model_validate(yaml.safe_load(path.read_text(encoding="utf-8"))), ()
    except FileNotFoundError:
        reason = "there is no such file; check the path"
        return None, (Problem(field="site file", value=path, reason=reason),)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = f"it cannot be read as YAML: {error}"
        return None, (Problem(field="site file", value=path, reason=reason),)
    except ValidationError as error:
        return None, tuple(map(_to_problem, error.errors(include_url=False)))


def _to_problem(error: ErrorDetails) -> Problem:
    where = [part for part in error["loc"] if part not in _TAGS]
    value, field = error["input"], error.get("ctx", {}).get("field")
    for part in field.split(".") if field else ():
        where.append(part)
        value = value.get(part) if isinstance(value, dict) else value
    named = ".".join(map(str, where)) or "site file"
    return Problem(field=named, value=value, reason=error["msg"])


def find_site(name: str) -> Path:
    """Return the file of a site: the user's own, or else the one that ships.

    Raises:
        SettingInvalid: There is neither.
    """
    files = get_site_files()
    if name not in files:
        reason = (
            f"there is no such file; the shipped sites are {', '.join(shipped_sites())}, and yours"
            f" would be in {user_sites_path()}"
        )
        raise SettingInvalid(setting="site", value=name, reason=reason)
    return files[name].path


def get_site_files() -> dict[str, SiteFile]:
    """Return the files that are found by name; the user's own hide shipped ones of their name."""
    own = {file.stem: file for file in user_sites_path().glob("*.yaml") if file.is_file()}
    return {
        name: SiteFile(name=name, path=path, is_own=name in own)
        for name, path in sorted({**shipped_sites(), **own}.items())
    }


def user_sites_path() -> Path:
    """Return the folder of the user's own site files, beside their settings."""
    return user_config_path().parent / "sites"


def shipped_sites() -> dict[str, Path]:
    """Return the site files that ship with the package, by name."""
    folder = resources.files("fabric.site_configs")
    with resources.as_file(folder) as path:
        return {file.stem: file for file in sorted(path.glob("*.yaml"), key=lambda file: file.stem)}
