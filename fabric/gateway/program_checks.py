"""What the hub makes of a program before it holds anything for it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from fabric.auth import Identity
from fabric.broker.programs import MAX_DEVICE_S, ProgramBounds, get_digest
from fabric.errors import NoReplica, ProgramInvalid
from fabric.gateway.constants import gather
from fabric.gateway.hub import Hub
from fabric.gateway.program_models import check_frame
from fabric.messages import PointManifest, ProgramInput, Request
from fabric.messages.nodes import Artifact
from fabric.programs import CAPS, check

GRACE_S = 60.0
"""How much longer than a program its gathered constants are kept."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A program that may be asked for, and what it may take."""

    request: Request
    bounds: ProgramBounds


async def get_points(hub: Hub, caller: Identity, model: str) -> PointManifest:
    """Return where programs may read and write in a model, as instances tell it that serve the
    caller.

    Raises:
        UnknownModel: The model is not in the catalog.
        NoReplica: No instance of it is there that runs programs.
    """
    seen = await hub.seen_by(caller)
    version = await hub.offload(seen.resolve, model)
    sites = {one.name for one in await hub.offload(seen.sites)}
    points = None
    if version.digest is not None:
        points = hub.broker.programs.points(version.digest, sites)
    if points is None:
        there = [one for one in hub.broker.replicas() if one.site in sites]
        replicas = [one for one in there if one.digest == version.digest]
        reasons = {one.instance: "it runs no programs" for one in replicas}
        raise NoReplica(model=version.ref, reasons=reasons)
    return points


async def prepare(hub: Hub, caller: Identity, request: Request, *, raw: bool = False) -> Prepared:
    """Check a program against the model it is for, with all that it takes from elsewhere.

    Args:
        hub: Knows models, points and artifacts.
        caller: Who asks.
        request: Of the mode ``program``.
        raw: Whether an instance has it already, and would only be told whether to run it.

    Raises:
        ProgramError: It is not valid, or too large for its tier.
        NotFound: It takes an artifact that the project does not have.
        UnknownModel: The model is not in the catalog.
        NoReplica: No instance of it is there that runs programs.
        TooManyRequests: The caller has as many in flight as it may have.
    """
    with hub.broker.programs.counted(caller):
        async with hub.checks:
            return await _prepare(hub, caller, request, raw)


async def _prepare(hub: Hub, caller: Identity, request: Request, raw: bool) -> Prepared:
    assert isinstance(request.input, ProgramInput)
    program = request.input.program
    if raw and any(isinstance(node, Artifact) for run in program.runs for node in run.nodes):
        raise ProgramInvalid(reason="raw calls take no stored results; ask the hub")
    points = await get_points(hub, caller, request.model)
    digest = await asyncio.to_thread(get_digest, program)
    found = await gather(program, caller.project, hub.artifacts, ttl_s=request.deadline_s + GRACE_S)
    # Beside the loop, because a large program takes a while.
    checked = await asyncio.to_thread(
        check, found.program, points, found.specs, caps=CAPS[request.tier]
    )
    if not raw:
        allowed_s = min(found.program.limits.device_s, MAX_DEVICE_S[request.tier])
        limits = found.program.limits.model_copy(update={"device_s": allowed_s})
        program = found.program.model_copy(update={"limits": limits})
        request = request.model_copy(update={"input": ProgramInput(program=program)})
        await asyncio.to_thread(check_frame, request)
    bounds = hub.broker.programs.bound(checked, points, request, program=digest)
    return Prepared(request, bounds)
