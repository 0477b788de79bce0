"""What the hub tells about itself: models, sites, runs, accounts. Times are ISO 8601 in UTC."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self

from fabric.sdk.results import Json


class Record:
    """Read from the hub's JSON. What a newer hub added is left out; what it left out is an error.

    ``nested`` says how fields that are not plain JSON are read.
    """

    __slots__ = ()
    nested: ClassVar[Mapping[str, Callable[[Any], Any]]] = {}

    @classmethod
    def from_reply(cls, reply: Json) -> Self:
        """Return the record."""
        names = {field.name for field in fields(cls)} & set(reply)  # type: ignore[arg-type]
        return cls(**{n: cls.nested.get(n, _as_is)(reply[n]) for n in names})


def _as_is(value: Any) -> Any:
    return value


def each(cls: type[Record]) -> Callable[[Any], Any]:
    """Return what reads a list of records."""
    return lambda items: tuple(cls.from_reply(item) for item in items)


@dataclass(frozen=True, slots=True, kw_only=True)
class WhoAmI(Record):
    """The caller as the hub knows it: a key's id, and the site an agent's key is bound to.

    ``auth`` is ``api-key`` or ``globus``; ``user`` is the Globus username, ``projects`` are all
    that a Globus user may choose from, and ``expires_at`` is the end of the key or token.
    """

    nested = {"scopes": tuple, "projects": tuple}

    key: str
    project: str
    scopes: tuple[str, ...]
    max_concurrent: int
    site: str | None
    auth: str
    user: str | None
    projects: tuple[str, ...]
    expires_at: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica(Record):
    """One running copy of a model, and how busy it is."""

    instance: str
    site: str
    model: str
    digest: str
    state: str
    dtype: str
    context_tokens: int
    max_rows: int
    num_running: int
    num_waiting: int
    num_in_flight: int
    cache_usage: float
    joined_at: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Model(Record):
    """One version of a model; ``digest`` is of its tensors, once an instance has reported it."""

    nested = {"replicas": each(Replica)}

    id: str
    name: str
    revision: str
    digest: str | None
    context_tokens: int
    dtype: str | None
    replicas: tuple[Replica, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Site(Record):
    """A place where models run; ``detail`` is what it last said of a launch in progress."""

    nested = {"replicas": each(Replica)}

    name: str
    display: str
    channel: str
    state: str
    detail: str
    replicas: tuple[Replica, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket(Record):
    """What pays for raw calls at one site, by this project; ``max_usu`` for all of them together.

    ``ticket`` itself is known only where it was just issued.
    """

    id: str
    site: str
    project: str
    max_usu: int | None
    expires_at: str
    ticket: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation(Record):
    """An allocation, in micro-SU; the site ``*`` is any."""

    name: str
    site: str
    available_usu: int
    held_usu: int
    starts_at: str | None
    ends_at: str | None
    period: str | None = None
    holder: str | None = None
    parent: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StatementLine(Record):
    """One line of a statement: a grant is positive, a charge negative.

    A refund ``mends`` the charge that has this ``entry``. A memo is 0: it tells what a machine
    charges its own account for ``job``, in words.
    """

    at: str
    kind: str
    allocation: str
    amount_usu: int
    balance_usu: int
    run: str | None
    site: str | None
    model: str | None
    memo: str
    entry: int | None = None
    mends: int | None = None
    job: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement(Record):
    """A project's allocations and what was granted and charged, oldest first.

    ``complete`` is false where older lines were left out by the limit.
    """

    nested = {"allocations": each(Allocation), "lines": each(StatementLine)}

    project: str
    allocations: tuple[Allocation, ...]
    lines: tuple[StatementLine, ...]
    complete: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Spend(Record):
    """What a project's runs of one model at one site add up to; refunds are not taken off."""

    model: str
    site: str | None
    num_runs: int
    prompt_tokens: int
    cached_prompt_tokens: int
    output_tokens: int
    device_s: float
    charge_usu: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunUsage(Record):
    """What a run consumed."""

    prompt_tokens: int
    cached_prompt_tokens: int
    output_tokens: int
    queue_s: float
    device_s: float
    hook_bytes_in: int = 0
    hook_bytes_out: int = 0
    adapter_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Run(Record):
    """The hub's record of one request: never its words. ``program`` is the SHA-256 of one."""

    nested = {"usage": RunUsage.from_reply}

    id: str
    project: str
    key_id: str
    state: str
    model: str
    digest: str | None
    site: str | None
    instance: str | None
    attempts: int
    usage: RunUsage
    charge_usu: int
    first_token_s: float | None
    total_s: float | None
    placement: Json | None
    error_code: str | None
    created_at: str
    finished_at: str | None
    adapter: str | None = None
    """The digest of the adapter that it named."""
    program: str | None = None

    @property
    def reason(self) -> str | None:
        """Why it ran where it did."""
        return self.placement["reason"] if self.placement else None
