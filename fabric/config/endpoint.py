"""How an administrator's Globus Compute endpoint starts blocks at a site.

Every text that ends up in a job script or on a command line is held to characters that mean nothing
to a shell; ``worker_init`` alone is shell text, and users have no say in it.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self
from uuid import UUID

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

ACCOUNT = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$(?!\n)"
"""An account that users may name themselves; the same expression in Python and in a schema."""


def _held_to(pattern: str, advice: str) -> AfterValidator:
    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise PydanticCustomError("characters", "{advice}", {"advice": advice})
        return text

    return AfterValidator(check)


def _walltime(value: object) -> object:
    if isinstance(value, int) and not isinstance(value, bool):
        clock = f"{value // 3600:02}:{value // 60 % 60:02}:{value % 60:02}"
        raise PydanticCustomError(
            "walltime",
            'YAML reads a bare {clock} as the number {value}; put it in quotes: "{clock}"',
            {"clock": clock, "value": value},
        )
    return value


Name = Annotated[
    str,
    _held_to(
        r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}",
        "it becomes part of a job script, so it may have letters, digits and . _ - only,"
        " at most 64 of them",
    ),
]
Walltime = Annotated[
    str,
    BeforeValidator(_walltime),
    _held_to(r"\d{1,4}:[0-5]\d:[0-5]\d", 'write hours, minutes and seconds, as in "01:30:00"'),
]
_Resources = Annotated[
    str,
    _held_to(
        r"[A-Za-z0-9_.:=+-]{0,256}",
        "write PBS resources joined by colons, as in ngpus=4:system=polaris",
    ),
]
_Words = Annotated[
    str,
    _held_to(
        r"[A-Za-z0-9_.,:=/@%+ -]{0,256}",
        "it becomes part of a command line, so it may have letters, digits, spaces and"
        " . _ , : = / @ % + - only",
    ),
]
_Directives = Annotated[
    str,
    _held_to(
        r"(#(SBATCH|PBS) +-[A-Za-z0-9_.,:=/@%+*()\[\]&| -]+(\n+|$))*",
        "write whole directives, one a line, as in '#SBATCH --gpus-per-node=4', without quotes,"
        " $, ; or backticks",
    ),
]
_Interface = Annotated[
    str,
    _held_to(
        r"[A-Za-z][A-Za-z0-9_.:-]{0,14}", "write a network interface of the login node, as in hsn0"
    ),
]
_Shell = Annotated[
    str,
    _held_to(
        r"[^\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]*",
        "it has control characters, which no shell script needs",
    ),
]
_Line = Annotated[
    str, _held_to(r"[^\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff]*", "write one line")
]
_Domain = Annotated[
    str,
    _held_to(
        r"([a-z0-9]([a-z0-9-]*[a-z0-9])?\.)+[a-z]{2,}",
        "write a domain of the identities, in lower case, as in uchicago.edu",
    ),
]
_Email = Annotated[str, _held_to(r"[^@\s\"']+@[^@\s\"']+", "write an email address")]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Launcher(_Frozen):
    """What starts the workers of a block.

    ``simple`` starts them on the block's first node only, and is right for one instance a block:
    an instance over several nodes starts its other processes itself.
    """

    kind: Literal["simple", "srun", "mpiexec"] = "simple"
    overrides: _Words = ""
    bind_cmd: _Words = "--cpu-bind"


class Choices(_Frozen):
    """What users may choose instead of the endpoint's own value; nothing else is theirs to say."""

    partition: tuple[Name, ...] = ()
    queue: tuple[Name, ...] = ()
    account: tuple[Name, ...] | Literal["any"] = ()
    walltime: tuple[Walltime, ...] = ()
    nodes_per_block: tuple[Annotated[int, Field(ge=1)], ...] = ()


class MultiUser(_Frozen):
    """An endpoint that root runs, and that becomes the local account of whoever calls it.

    ``domains`` are those whose identities have an account of the same name here. ``auth_project``
    is the Globus Auth project an authentication policy for them is to be made in;
    ``authentication_policy`` is that policy once it is made.
    """

    domains: tuple[_Domain, ...] = Field(min_length=1)
    pam: bool = True
    auth_project: UUID | None = None
    authentication_policy: UUID | None = None
    subscription_id: UUID | None = None


_ONLY_FOR: dict[str, tuple[str, ...]] = {
    "partition": ("slurm",),
    "exclusive": ("slurm",),
    "queue": ("pbspro",),
    "select_options": ("pbspro",),
    "cpus_per_node": ("pbspro",),
    "account": ("slurm", "pbspro"),
    "walltime": ("slurm", "pbspro"),
    "nodes_per_block": ("slurm", "pbspro"),
    "scheduler_options": ("slurm", "pbspro"),
}
_NEEDED = {"local": (), "slurm": ("walltime",), "pbspro": ("walltime", "cpus_per_node")}
_DIRECTIVE = {"slurm": "#SBATCH", "pbspro": "#PBS"}


class EndpointSpec(_Frozen):
    """How blocks are started behind a Globus Compute endpoint; times are in seconds.

    ``workers_per_node`` counts the instance's own worker, which it keeps for its whole life, and
    those for the short calls beside it. ``manager_lost_s`` is how long a block may be silent
    before its tasks are given up; ``idle_s`` how long a user endpoint may be idle before it ends.
    """

    scheduler: Literal["local", "slurm", "pbspro"]
    partition: Name | None = None
    queue: Name | None = None
    account: Name | None = None
    walltime: Walltime | None = None
    nodes_per_block: int = Field(default=1, ge=1)
    max_blocks: int = Field(default=1, ge=1)
    workers_per_node: int = Field(default=4, ge=2)
    cpus_per_node: int | None = Field(default=None, ge=1)
    exclusive: bool = True
    select_options: _Resources = ""
    scheduler_options: _Directives = ""
    worker_init: _Shell = ""
    interface: _Interface | None = None
    launcher: Launcher = Launcher()
    choices: Choices = Choices()
    multi_user: MultiUser | None = None
    display_name: _Line = ""
    contact_email: _Email | None = None
    public: bool = False
    allowed_functions: tuple[UUID, ...] = ()
    heartbeat_s: int = Field(default=10, ge=5)
    manager_heartbeat_s: int = Field(default=5, ge=1)
    manager_lost_s: int = Field(default=30, ge=2)
    block_idle_s: int = Field(default=120, ge=1)
    idle_s: int = Field(default=600, ge=10)
    cmd_timeout_s: int = Field(default=60, ge=1)

    @model_validator(mode="after")
    def _fits_scheduler(self) -> Self:
        # Only what differs from the defaults: a file that was written by a program has them all.
        said = self.model_dump(exclude_defaults=True, include=set(_ONLY_FOR)).keys() | {
            f"choices.{name}" for name in self.choices.model_dump(exclude_defaults=True)
        }
        for field in sorted(said):
            schedulers = _ONLY_FOR.get(field.removeprefix("choices."))
            if schedulers and self.scheduler not in schedulers:
                raise unfit(field, f"{field} belongs to {' and '.join(schedulers)}; leave it out")
        for field in _NEEDED[self.scheduler]:
            if getattr(self, field) is None:
                raise unfit(field, f"{self.scheduler} needs {field}; say it")
        directive = _DIRECTIVE.get(self.scheduler, "")
        for line in self.scheduler_options.splitlines():
            if line and not line.startswith(directive + " "):
                raise unfit("scheduler_options", f"{line!r} is not a {directive} directive")
        if self.multi_user and not self.contact_email:
            raise unfit("contact_email", "an endpoint for many users needs one; say it")
        if self.launcher.kind == "srun" and self.scheduler != "slurm":
            raise unfit("launcher.kind", "srun is Slurm's; use simple or mpiexec")
        if self.manager_lost_s < 2 * self.manager_heartbeat_s:
            raise unfit("manager_lost_s", "make it at least twice manager_heartbeat_s")
        return self

    def options(self) -> dict[str, tuple[str | int, ...] | Literal["any"]]:
        """Return what users may choose: each option's values, the endpoint's own one first.

        ``"any"`` stands for every name that follows ``ACCOUNT``.
        """
        allowed: dict[str, tuple[str | int, ...] | Literal["any"]] = {}
        for name, values in self.choices:
            own = getattr(self, name)
            if values == "any":
                allowed[name] = "any"
            elif values:
                allowed[name] = tuple(dict.fromkeys([own, *values] if own is not None else values))
        return allowed


def to_seconds(walltime: str) -> int:
    """Return a walltime such as ``01:30:00`` in seconds."""
    hours, minutes, seconds = map(int, walltime.split(":"))
    return hours * 3600 + minutes * 60 + seconds


def unfit(field: str, reason: str) -> PydanticCustomError:
    """Return the error for a field that does not go with the others."""
    return PydanticCustomError("unfit", "{reason}", {"reason": reason, "field": field})
