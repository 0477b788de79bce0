"""Instances that a user brings: how the hub is asked for them, and what it says of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fabric.sdk.records import Record
from fabric.sdk.results import Json

if TYPE_CHECKING:
    from fabric.sdk.transport import Transport

_PATH = "/v1/fabric/instances"


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnInstance(Record):
    """An instance in a job of one's own; ``connected`` says whether the hub has its session.

    Without ``overflow`` it keeps the requests of those whose it is.
    """

    instance: str
    machine: str
    site: str
    model: str
    sharing: str
    overflow: bool
    state: str
    connected: bool
    num_running: int
    num_waiting: int
    created_at: str


async def add(
    transport: Transport,
    *,
    model: str,
    machine: str,
    sharing: str,
    overflow: bool | None,
    lifetime_s: float,
) -> Json:
    """Ask for the permission for one instance; see ``Fabric.add_instance``."""
    body: dict[str, object] = {"model": model, "machine": machine, "sharing": sharing}
    body |= {"lifetime_s": lifetime_s, "overflow": overflow}
    reply: Json = await transport.post(_PATH, body)
    return reply


async def listed(transport: Transport) -> tuple[OwnInstance, ...]:
    """Return the project's own instances, newest first."""
    reply = await transport.get(_PATH)
    return tuple(OwnInstance.from_reply(item) for item in reply["data"])


async def expect(transport: Transport, instance: str, ready_in_s: float) -> None:
    """Say when an instance should have joined."""
    await transport.post(f"{_PATH}/{instance}/outlook", {"ready_in_s": ready_in_s})


async def report_job(transport: Transport, instance: str, job: Mapping[str, object]) -> Json:
    """Note what an instance's job took."""
    reply: Json = await transport.post(f"{_PATH}/{instance}/job", dict(job))
    return reply


async def report_balance(
    transport: Transport, instance: str, balance: Mapping[str, object]
) -> None:
    """Note what the account has left that pays for an instance."""
    await transport.post(f"{_PATH}/{instance}/balance", dict(balance))


async def drain(transport: Transport, instance: str) -> None:
    """Ask an instance to finish what it has and leave."""
    await transport.post(f"{_PATH}/{instance}/drain", {})


async def end(transport: Transport, instance: str, reason: str, *, failed: bool) -> None:
    """Void an instance's token."""
    body = {"reason": reason[:1000], "failed": failed}
    await transport.post(f"{_PATH}/{instance}/end", body)
