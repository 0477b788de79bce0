"""What the catalog keeps. Never a prompt, an output or a secret. Times are UTC."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from fabric.messages import InstanceState, Placement, RunState, Usage

SiteState = Literal["enabled", "disabled"]
NO_USAGE = Usage()


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteRecord:
    """A centre that runs instances. ``facts`` is what its site file says of it, as JSON."""

    name: str
    display: str
    channel: Literal["session", "parsl"]
    state: SiteState
    facts: Mapping[str, object]
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelVersion:
    """One immutable version of a model; ``digest`` is ``None`` until an instance has reported it.

    ``source`` says where the weights are.
    """

    name: str
    revision: str
    digest: str | None
    context_tokens: int
    dtype: str | None
    source: str
    created_at: datetime

    @property
    def ref(self) -> str:
        """The version as ``name@revision``."""
        return f"{self.name}@{self.revision}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchRecord:
    """The permission for one instance to join; its token is kept as a hash only."""

    instance: str
    site: str
    model: str
    digest: str | None
    state: InstanceState
    created_at: datetime
    expires_at: datetime
    ended_at: datetime | None = None
    ended_reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """One request: whose, where it ran and why there, what it used and cost, how it ended."""

    id: str
    project: str
    key_id: str
    model: str
    state: RunState
    created_at: datetime
    digest: str | None = None
    site: str | None = None
    instance: str | None = None
    attempts: int = 0
    usage: Usage = NO_USAGE
    charge_usu: int = 0
    first_token_s: float | None = None
    total_s: float | None = None
    placement: Placement | None = None
    error_code: str | None = None
    finished_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageSum:
    """What a project's runs of one model at one site add up to."""

    model: str
    site: str | None
    num_runs: int
    prompt_tokens: int
    cached_prompt_tokens: int
    output_tokens: int
    device_s: float
    charge_usu: int
