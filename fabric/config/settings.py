"""The settings of a hub and of its clients, resolved once."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import platformdirs
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from fabric.config.state import StateDir
from fabric.errors import SettingInvalid

SITE_CONFIG_PATH = Path("/etc/fabric/config.yaml")


Weight = Annotated[float, Field(gt=0.0, le=1_000.0)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class HubSettings(_Section):
    """What a hub runs with.

    ``database_url`` is an SQLAlchemy URL; ``None`` means a SQLite file in the state directory.
    With the client id and secret of its registration at Globus Auth, a hub takes Globus logins
    whose tokens have ``globus_scope``; ``None`` means the registration's scope ``all``.
    ``project_weights`` say how much of busy replicas is a project's, relative to others (1): a
    mapping, or ``name=weight`` with commas between.
    """

    host: str = "127.0.0.1"
    port: int = Field(default=8642, ge=0, le=65535)
    database_url: str | None = None
    body_limit_bytes: int = Field(default=8 * 2**20, ge=1024)
    heartbeat_s: float = Field(default=2.0, gt=0)
    lease_s: float = Field(default=60.0, gt=0)
    first_token_timeout_s: float = Field(default=60.0, gt=0)
    patience_s: float = Field(default=10.0, ge=0)
    project_weights: Mapping[str, Weight] = {}
    globus_client_id: str | None = None
    globus_client_secret: str | None = None
    globus_scope: str | None = None

    @field_validator("project_weights", mode="before")
    @classmethod
    def _read_weights(cls, given: object) -> object:
        if not isinstance(given, str):
            return given
        return dict(pair.split("=", 1) for pair in given.split(",") if pair)


class ClientSettings(_Section):
    """What a client talks to, and as whom.

    Without an API key it is the Globus login for the hub that ``globus_hub_client_id`` names (its
    scope as for ``HubSettings``): a person's, through the application ``globus_client_id``, or that
    application's own where it has a secret. ``project`` chooses among several.
    """

    base_url: str = "http://127.0.0.1:8642"
    api_key: str | None = None
    project: str | None = Field(default=None, pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    model: str | None = None
    timeout_s: float = Field(default=300.0, gt=0)
    globus_hub_client_id: str | None = None
    globus_scope: str | None = None
    globus_client_id: str | None = None
    globus_client_secret: str | None = None


class Settings(_Section):
    """All settings, with where each came from."""

    state_dir: Path
    hub: HubSettings = HubSettings()
    client: ClientSettings = ClientSettings()
    origins: Mapping[str, Origin] = {}

    def get_database_url(self) -> str:
        """Return the hub's database URL."""
        return self.hub.database_url or StateDir(self.state_dir).database_url


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """A setting's value as text (secrets masked) and the layer it came from."""

    value: str
    source: str


Settings.model_rebuild()

_SECTIONS: dict[str, type[_Section]] = {"hub": HubSettings, "client": ClientSettings}
_SECRETS = frozenset({"client.api_key", "client.globus_client_secret", "hub.globus_client_secret"})

Layer = tuple[str, Mapping[str, object]]


def globus_scope_of(client_id: str) -> str:
    """Return the scope ``all`` of a service that is registered with Globus Auth."""
    return f"https://auth.globus.org/scopes/{client_id}/all"


def user_config_path() -> Path:
    """Return where the user's file is read from."""
    return platformdirs.user_config_path("fabric") / "config.yaml"


def environment_name(setting: str) -> str:
    """Return the environment variable of a setting: ``FABRIC_API_KEY``, ``FABRIC_HUB_PORT``."""
    return "FABRIC_" + setting.removeprefix("client.").replace(".", "_").upper()


def load_settings(
    flags: Mapping[str, object] | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    site_path: Path = SITE_CONFIG_PATH,
    user_path: Path | None = None,
) -> Settings:
    """Resolve the settings.

    Args:
        flags: Dotted names to values, from a command line; ``None`` values are not given.
        environ: The environment; the process's own by default.
        site_path: The file of the machine's administrators.
        user_path: The user's own file.

    Raises:
        SettingInvalid: A file, variable or flag has an unknown name or a value out of range.
    """
    environ = os.environ if environ is None else environ
    names = ["state_dir", *(f"{s}.{f}" for s, cls in _SECTIONS.items() for f in cls.model_fields)]
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    files = [
        (str(path), _read_file(path))
        for path in (site_path, user_path or user_config_path())
        if path.is_file()
    ]
    variables = [
        (environment_name(name), {name: environ[environment_name(name)]})
        for name in names
        if environ.get(environment_name(name))
    ]
    upper: list[Layer] = [*files, *variables, ("flag", given)]
    state_dir = Path(str(_last(upper, "state_dir") or platformdirs.user_state_dir("fabric")))
    layers = [*_running(state_dir), *upper]
    for source, layer in layers:
        if unknown := sorted(set(layer) - set(names)):
            raise SettingInvalid(
                setting=unknown[0],
                value=layer[unknown[0]],
                reason=f"there is no such setting; there are {', '.join(names)}",
                source=source,
            )
    return _build(names, layers, state_dir)


def _build(names: list[str], layers: list[Layer], state_dir: Path) -> Settings:
    values = {name: value for _, layer in layers for name, value in layer.items()}
    sources = {name: source for source, layer in layers for name in layer}
    sections = {}
    for section, cls in _SECTIONS.items():
        own = {n.partition(".")[2]: v for n, v in values.items() if n.startswith(section + ".")}
        try:
            sections[section] = cls.model_validate(own)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = f"{section}.{first['loc'][0]}"
            raise SettingInvalid(
                setting=name,
                value="***" if name in _SECRETS else first["input"],
                reason=first["msg"],
                source=sources[name],
            ) from error
    origins = {
        "state_dir": Origin(value=str(state_dir), source=sources.get("state_dir", "default"))
    }
    for name in names[1:]:
        section, _, field = name.partition(".")
        value = getattr(sections[section], field)
        shown = _mask(value) if name in _SECRETS and value else "" if value is None else str(value)
        origins[name] = Origin(value=shown, source=sources.get(name, "default"))
    return Settings.model_validate({"state_dir": state_dir, **sections, "origins": origins})


def _last(layers: list[Layer], name: str) -> object | None:
    return next((layer[name] for _, layer in reversed(layers) if name in layer), None)


def _running(state_dir: Path) -> list[Layer]:
    federation = StateDir(state_dir).federation()
    if federation is None:
        return []
    client = {
        "client.base_url": federation.base_url,
        "client.api_key": federation.api_key,
        "client.model": federation.model,
    }
    return [("running federation", client)]


def _read_file(path: Path) -> Mapping[str, object]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingInvalid(
            setting="file", value=path, reason=f"it cannot be read as YAML: {error}"
        ) from error
    if not isinstance(data, dict):
        raise SettingInvalid(setting="file", value=path, reason="it must be a mapping of sections")
    return dict(_flatten(data))


def _flatten(data: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}.{field}", item) for field, item in value.items())
        else:
            yield str(key), value


def _mask(secret: object) -> str:
    """Return an API key's beginning, which names it; nothing of other secrets."""
    text = str(secret)
    return f"{text[:8]}…" if text.startswith("fab_") and len(text) > 16 else "***"
