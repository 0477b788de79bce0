"""What somebody who brings an allocation asks for."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from fabric.config.endpoint import Name, Walltime, to_seconds, unfit
from fabric.launch.jobs.staging import Wish
from fabric.messages import EngineOptions
from fabric.messages.request import ModelRef
from fabric.messages.wire import Wire

Sharing = Literal["private", "project", "shared"]
"""Who may use an instance: the key or login that launched it, its project, or everybody."""

MAX_REPLICAS = 16

JOIN_S = 120.0
MIN_WALLTIME_S = 60


def _in_utc(at: datetime) -> datetime:
    return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)


def _of_a_minute(walltime: str) -> str:
    if to_seconds(walltime) < MIN_WALLTIME_S:
        raise unfit("walltime", "schedulers count whole minutes; ask for one at least")
    return walltime


class Order(Wire):
    """Instances of a model in jobs of one machine.

    Args:
        model: ``name@revision``.
        machine: The name of a site file that has a ``system``.
        queue: A queue, partition or quality of service of it; ``None``: its default.
        account: Which allocation of the machine's pays; ``None``: the user's default there.
        nodes: Of one job, which runs one instance.
        walltime: Of one job, ``HH:MM:SS``.
        replicas: Jobs at once.
        sharing: Who may use the instances.
        overflow: Whether requests of those whose they are may go elsewhere while one is there;
            ``None``: if everybody may use them.
        keep_until: Jobs follow one another until then; ``None``: there is one generation.
        idle_stop_s: Ends an instance that had nothing to do for so long.
        join_s: How long an instance that is ready may take to reach the hub.
        staging: Whether weights are copied to the nodes' own disks: where it pays, or as said.
        options: How the engine is sized.
    """

    model: ModelRef
    machine: Name
    queue: Name | None = None
    account: Name | None = None
    nodes: int = Field(default=1, ge=1, le=100_000)
    walltime: Annotated[Walltime, AfterValidator(_of_a_minute)]
    replicas: int = Field(default=1, ge=1, le=MAX_REPLICAS)
    sharing: Sharing = "project"
    overflow: bool | None = None
    keep_until: Annotated[datetime, AfterValidator(_in_utc)] | None = None
    idle_stop_s: float | None = Field(default=None, gt=0)
    join_s: float = Field(default=JOIN_S, gt=0)
    staging: Wish = "auto"
    options: EngineOptions = EngineOptions()

    @field_validator("overflow")
    @classmethod
    def _keeps_what_it_can(cls, overflow: bool | None, order: ValidationInfo) -> bool | None:
        if overflow is False and order.data.get("sharing") == "shared":
            raise unfit("overflow", "instances for everybody keep nobody's requests; leave it out")
        return overflow

    @property
    def keeps(self) -> bool:
        """Whether requests of those whose the instances are go nowhere else meanwhile."""
        return self.sharing != "shared" and not self.overflow

    @property
    def walltime_s(self) -> int:
        """The walltime in seconds."""
        return to_seconds(self.walltime)
