"""What the catalog keeps. Never a prompt, an output or a secret. Times are UTC."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from pydantic import AwareDatetime, Field

from fabric.messages import InstanceState, Placement, RunState, Usage
from fabric.messages.wire import Wire

SiteState = Literal["enabled", "disabled"]
Visibility = Literal["private", "group", "public"]
NO_USAGE = Usage()


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteRecord:
    """A centre that runs instances. ``facts`` is what its site file says of it, as JSON.

    A machine on which somebody runs instances in jobs of their own is a site too; its facts are
    ``OwnSite``. What administrators set for the broker is among the facts as well: ``SiteRules``.
    """

    name: str
    display: str
    channel: Literal["session", "parsl"]
    state: SiteState
    facts: Mapping[str, object]
    created_at: datetime

    @property
    def own(self) -> OwnSite | None:
        """Whose it is, if it is not the fabric's."""
        owner = self.facts.get("owner")
        return None if owner is None else OwnSite.model_validate(owner)

    @property
    def rules(self) -> SiteRules:
        """What the broker keeps to there."""
        return SiteRules.model_validate(self.facts.get("rules", {}))

    def may_use(self, project: str, key_id: str) -> bool:
        """Return whether requests of a caller may run there."""
        return self.own is None or self.own.admits(project, key_id)


class Maintenance(Wire):
    """A time in which a site takes no requests, from ``starts_at`` until ``ends_at``."""

    id: str
    starts_at: AwareDatetime
    ends_at: AwareDatetime
    reason: str = ""


class SiteRules(Wire):
    """What the broker keeps to at a site.

    ``max_in_flight`` is how many requests it has there at once; ``maintenance`` is in order of
    time.
    """

    max_in_flight: int | None = Field(default=None, ge=1)
    maintenance: tuple[Maintenance, ...] = ()


class OwnSite(Wire):
    """A machine on which one project runs instances in jobs of its own.

    ``sharing`` says who may use them: the key or login that launched them, its project, or all.
    While one is there, requests of those whose it is go nowhere else but with ``overflow``; one
    that is shared with all keeps nobody's.
    """

    machine: str
    project: str
    key_id: str
    sharing: Literal["private", "project", "shared"]
    overflow: bool = False

    @property
    def keeps(self) -> bool:
        """Whether its owners' requests go nowhere else while an instance is there."""
        return not self.overflow and self.sharing != "shared"

    def belongs_to(self, project: str, key_id: str) -> bool:
        """Return whether it is a caller's own: whoever owns it may end its instances."""
        mine = self.key_id == key_id if self.sharing == "private" else True
        return project == self.project and mine

    def admits(self, project: str, key_id: str) -> bool:
        """Return whether a caller may use its instances."""
        match self.sharing:
            case "private":
                return (project, key_id) == (self.project, self.key_id)
            case "project":
                return project == self.project
            case "shared":
                return True


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
    """One request: whose, where it ran and why there, what it used and cost, how it ended.

    ``program`` is the SHA-256 of an intervention program; nothing else of it is kept.
    """

    id: str
    project: str
    key_id: str
    model: str
    state: RunState
    created_at: datetime
    digest: str | None = None
    adapter: str | None = None
    site: str | None = None
    instance: str | None = None
    attempts: int = 0
    usage: Usage = NO_USAGE
    charge_usu: int = 0
    first_token_s: float | None = None
    total_s: float | None = None
    placement: Placement | None = None
    error_code: str | None = None
    program: str | None = None
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


@dataclass(frozen=True, slots=True, kw_only=True)
class UserSum:
    """What one key or Globus login has asked for a project; ``last_at`` is its latest request."""

    key_id: str
    project: str
    num_runs: int
    charge_usu: int
    last_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class RedemptionRecord:
    """A raw call that a ticket was redeemed for: what its instance may be paid, and until when.

    Args:
        run: The call's id, also its hold's.
        ticket: The ticket's id.
        key_id: The key that the ticket was issued to.
        project: Who pays.
        site: Where it runs, and whose rates count.
        instance: What runs it: nobody else may say what it consumed.
        model: The version as ``name@revision``.
        digest: The version's digest.
        tier: What the rates are multiplied by.
        prompt_tokens_bound: At least as many tokens as the prompt has.
        max_output_tokens: The most tokens of all choices together.
        max_hook_bytes_in: Of a program, the bytes it was given.
        max_hook_bytes_out: The most bytes it may return.
        max_device_s: The most seconds of computing it is charged for.
        program: Its SHA-256.
        held_usu: The most it may cost.
        charge_usu: What it did cost; ``None`` until its books are closed.
        created_at: When it was admitted.
        due_at: When it is over at the latest.
    """

    run: str
    ticket: str
    key_id: str
    project: str
    site: str
    instance: str
    model: str
    digest: str
    tier: str
    prompt_tokens_bound: int
    max_output_tokens: int
    max_hook_bytes_in: int = 0
    max_hook_bytes_out: int = 0
    max_device_s: float = 0.0
    program: str | None = None
    held_usu: int
    charge_usu: int | None = None
    created_at: datetime
    due_at: datetime

    @property
    def name(self) -> str:
        """The model's name without its revision."""
        return self.model.partition("@")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionRecord:
    """A function registered with Globus Compute, under the id the service gave it.

    ``sha256`` is of its source and ``fabric_version`` the release that shipped it. A function of
    ``group_id`` may be called by that Globus group's members; one with ``endpoint_id`` runs at that
    endpoint alone.
    """

    id: str
    name: str
    sha256: str
    fabric_version: str
    visibility: Visibility
    group_id: str | None = None
    endpoint_id: str | None = None
    created_at: datetime
    retired_at: datetime | None = None
