"""What is known of a machine: its nodes, its queues and their limits, what it charges.

A fact is in a site's file only when it was read where ``sources`` says; nothing stands for a fact
that is not there.
"""

from __future__ import annotations

from datetime import date
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fabric.config.endpoint import EndpointSpec, Name, Walltime, to_seconds, unfit

_Line = Annotated[str, Field(min_length=1, max_length=300, pattern=r"^[^\x00-\x1f\x7f]+$")]
_Url = Annotated[str, Field(pattern=r"^https://[A-Za-z0-9.-]+(:\d+)?(/\S*)?$", max_length=300)]
_Proxy = Annotated[str, Field(pattern=r"^(https?|socks5?)://[A-Za-z0-9.-]+:\d{1,5}$")]
_Path = Annotated[str, Field(pattern=r"^/[A-Za-z0-9_./-]*$", max_length=300)]
_Count = Annotated[int, Field(ge=1)]
_Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class NodeKind(_Frozen):
    """Nodes of one kind.

    Memory is in GB as the centre states it. ``devices`` are what its scheduler counts, each with
    ``device_memory_gb``; ``device_parts`` is how many a program sees of each when that is more.
    """

    count: _Count | None = None
    cores: _Count | None = None
    memory_gb: _Amount | None = None
    devices: Annotated[int, Field(ge=0)] | None = None
    device: _Line | None = None
    device_memory_gb: _Amount | None = None
    device_parts: _Count = 1


class Bin(_Frozen):
    """How long a job of so many nodes may run."""

    min_nodes: _Count
    max_nodes: _Count
    max_walltime: Walltime

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_nodes > self.max_nodes:
            raise unfit("max_nodes", f"make it at least min_nodes, {self.min_nodes}")
        return self


class Queue(_Frozen):
    """A queue, a partition or a quality of service, and what it allows.

    ``bins`` are the limits by the number of nodes where the walltime depends on it.
    ``device_counts`` are the only numbers of devices that a job may ask for.
    ``units_per_node_hour`` is the charge of a node for an hour in the site's unit;
    ``charge_factor`` multiplies the charge that the site's rule makes.
    """

    kind: Literal["queue", "partition", "qos"] | None = None
    nodes: Name | None = None
    default: bool = False
    min_nodes: _Count | None = None
    max_nodes: _Count | None = None
    min_walltime: Walltime | None = None
    max_walltime: Walltime | None = None
    bins: tuple[Bin, ...] = ()
    device_counts: tuple[_Count, ...] = ()
    shared_nodes: bool | None = None
    preemptible: bool = False
    access: Literal["open", "by-request"] = "open"
    available: bool = True
    max_running_per_user: _Count | None = None
    max_submitted_per_user: _Count | None = None
    max_running_per_project: _Count | None = None
    max_submitted_per_project: _Count | None = None
    max_nodes_per_user: _Count | None = None
    units_per_node_hour: _Amount | None = None
    charge_factor: _Amount | None = None
    note: _Line | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_nodes and self.max_nodes and self.min_nodes > self.max_nodes:
            raise unfit("max_nodes", f"make it at least min_nodes, {self.min_nodes}")
        shortest, longest = self.min_walltime, self.max_walltime
        if shortest and longest and to_seconds(shortest) > to_seconds(longest):
            raise unfit("max_walltime", f"make it at least min_walltime, {shortest}")
        reach = 0
        for place, each in enumerate(self.bins):
            if each.min_nodes <= reach:
                reason = f"the bin before it ends at {reach} nodes; begin after that"
                raise unfit(f"bins.{place}.min_nodes", reason)
            reach = each.max_nodes
        return self

    def get_max_walltime(self, nodes: int) -> str | None:
        """Return how long a job of so many nodes may run; ``None`` if that is not known."""
        for each in self.bins:
            if each.min_nodes <= nodes <= each.max_nodes:
                return each.max_walltime
        return self.max_walltime


class BalanceConfig(_Frozen):
    """How a project's balance is asked for: with which command, or of which facility's API.

    ``resource`` is sbank's name of the machine, or the capability of a facility's allocations;
    ``url`` is where the facility's API is, its version included; ``since`` is the day from which
    the centre counts what an account of its Slurm has used.
    """

    kind: Literal["slurm", "sbank", "accounts", "showusage", "taccinfo", "mybalance", "iri"]
    resource: Name | None = None
    url: _Url | None = None
    since: date | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.since is not None and self.kind != "slurm":
            raise unfit("since", "the kind slurm alone takes it; leave it out")
        if (self.kind == "iri") != (self.url is not None):
            raise unfit("url", "the kind iri needs it, and no other kind takes it")
        if self.kind == "sbank" and self.resource is None:
            raise unfit("resource", "sbank needs the machine's name, as in polaris; say it")
        return self


class Charge(_Frozen):
    """What is charged for: ``unit`` is the site's own, ``rule`` how it says a charge is made.

    ``min_hours`` is the least time that a job is charged for; ``command`` is what shows a balance
    to a person.
    """

    unit: _Line
    rule: _Line | None = None
    min_hours: _Amount = 0.0
    whole_nodes: bool | None = None
    command: _Line | None = None
    balance: BalanceConfig | None = None


class Network(_Frozen):
    """What compute nodes reach: ``outbound`` is how they reach the internet, if at all."""

    outbound: Literal["direct", "proxy", "none"] | None = None
    proxy: _Proxy | None = None
    no_proxy: _Line | None = None
    interface: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_.:-]{0,14}$")] | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.outbound == "proxy") != (self.proxy is not None):
            raise unfit("proxy", "say it where outbound is proxy, and nowhere else")
        return self


class Storage(_Frozen):
    """What a node reads weights from: the file system that all share, and a disk of its own.

    Rates are in GB/s as one node has them. ``local_dir`` is a directory on the node's own disk,
    which has ``local_gb``; without it nothing is copied there.
    """

    shared_read_gb_s: _Rate | None = None
    local_read_gb_s: _Rate | None = None
    local_write_gb_s: _Rate | None = None
    local_dir: _Path | None = None
    local_gb: _Amount | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        rated = self.shared_read_gb_s and self.local_read_gb_s and self.local_write_gb_s
        if self.local_dir is not None and not rated:
            reason = "local_dir is used where it pays: say how fast both are, in GB/s"
            raise unfit("shared_read_gb_s", reason)
        return self


class System(_Frozen):
    """A machine of a centre.

    ``checked`` is the month in which ``sources`` were read. ``modules`` are the lines that make the
    machine's software available, ``containers`` the runtime that starts images on its nodes.
    ``node_command`` starts a process on a further node of a job: by default srun or pbsdsh.
    """

    center: _Line
    scheduler: Literal["local", "slurm", "pbspro", "none"]
    architecture: Literal["x86_64", "aarch64"] = "x86_64"
    nodes: dict[Name, NodeKind] = {}
    queues: dict[Name, Queue] = {}
    charge: Charge | None = None
    network: Network = Network()
    file_systems: tuple[Name, ...] = ()
    model_weights: _Path | None = None
    storage: Storage = Storage()
    node_command: Literal["srun", "pbsdsh", "ssh"] | None = None
    modules: tuple[_Line, ...] = ()
    containers: Literal["apptainer", "singularity", "podman"] | None = None
    maintenance: _Line | None = None
    documentation: _Url | None = None
    sources: tuple[_Line, ...] = Field(min_length=1)
    checked: Annotated[str, Field(pattern=r"^20\d\d-(0[1-9]|1[0-2])$")]

    @model_validator(mode="after")
    def _refers_to_itself(self) -> Self:
        for name, queue in self.queues.items():
            if queue.nodes is not None and queue.nodes not in self.nodes:
                known = ", ".join(self.nodes) or "none"
                raise unfit(f"queues.{name}.nodes", f"name a kind under nodes ({known})")
        return self


def check_endpoint_fits(system: System, endpoint: EndpointSpec) -> None:
    """Hold what an endpoint submits against the limits of the machine.

    Raises:
        PydanticCustomError: A value is outside of them.
    """
    if endpoint.scheduler not in (system.scheduler, "local"):
        raise unfit("endpoint.scheduler", f"the system's is {system.scheduler}; say the same")
    if endpoint.scheduler == "local":
        return
    field = "partition" if endpoint.scheduler == "slurm" else "queue"
    chosen = getattr(endpoint, field)
    choices = getattr(endpoint.choices, field)
    named = {f"endpoint.choices.{field}.{place}": name for place, name in enumerate(choices)}
    for where, name in {f"endpoint.{field}": chosen, **named}.items():
        if name is not None and system.queues and name not in system.queues:
            reason = f"the system's queues are {', '.join(system.queues)}; name one of them"
            raise unfit(where, reason)
    if chosen in system.queues:
        _check_limits(chosen, system.queues[chosen], endpoint)


def _check_limits(name: str, queue: Queue, endpoint: EndpointSpec) -> None:
    num_nodes, walltime = endpoint.nodes_per_block, endpoint.walltime
    if num_nodes < (queue.min_nodes or 1):
        reason = f"{name} takes jobs of at least {queue.min_nodes} nodes; ask for so many"
        raise unfit("endpoint.nodes_per_block", reason)
    if queue.max_nodes and num_nodes > queue.max_nodes:
        reason = f"{name} takes jobs of at most {queue.max_nodes} nodes; ask for fewer"
        raise unfit("endpoint.nodes_per_block", reason)
    longest, shortest = queue.get_max_walltime(num_nodes), queue.min_walltime
    if walltime and longest and to_seconds(walltime) > to_seconds(longest):
        reason = f'{name} lets such a job run for "{longest}" at most; ask for less'
        raise unfit("endpoint.walltime", reason)
    if walltime and shortest and to_seconds(walltime) < to_seconds(shortest):
        raise unfit("endpoint.walltime", f'{name} wants at least "{shortest}"; ask for more')
