"""The hub's side of raw calls: a session's till, which knows tickets and asks the broker."""

from __future__ import annotations

import logging

from fabric.errors import FabricError, ProtocolViolation, TicketForeign
from fabric.gateway.hub import Hub
from fabric.gateway.program_checks import prepare
from fabric.messages import Failure, Hello, Metered, Redeem, Redeemed, Settled

logger = logging.getLogger(__name__)


class SessionTill:
    """The ``fabric.dispatch.session.Till`` of one instance.

    Args:
        hub: Whose tickets and broker.
        hello: What the instance was accepted as: a ticket counts at its site only.
    """

    def __init__(self, hub: Hub, hello: Hello) -> None:
        self._hub = hub
        self._hello = hello

    async def redeem(self, frame: Redeem) -> Redeemed:
        """Admit a task if its ticket is good here; never raises."""
        failure = None
        try:
            await self._redeem(frame)
        except FabricError as error:
            where = {"instance": self._hello.instance, "run": frame.task_id, "code": error.code}
            logger.info("raw call refused", extra=where)
            failure = Failure.of(error)
        except Exception:
            logger.exception("raw call not admitted", extra={"run": frame.task_id})
            failure = Failure.of(FabricError("The hub failed on this call; nothing was charged."))
        return Redeemed(task_id=frame.task_id, attempt=frame.attempt, failure=failure)

    async def settle(self, frame: Metered) -> Settled | None:
        """Close the books on a task; ``None`` if they could not be written now. Never raises."""
        try:
            await self._hub.broker.settle(self._hello.instance, frame)
        except Exception:
            logger.exception("raw call not charged yet", extra={"run": frame.task_id})
            return None
        return Settled(task_id=frame.task_id, attempt=frame.attempt)

    async def _redeem(self, frame: Redeem) -> None:
        hub, hello = self._hub, self._hello
        if frame.task_id != frame.request.id:
            raise ProtocolViolation(
                peer=f"The instance {hello.instance!r}", reason="a task with another's request"
            )
        ticket = await hub.offload(hub.keys.tickets.authenticate, frame.ticket)
        if ticket.site != hello.site:
            raise TicketForeign(site=ticket.site, here=hello.site)
        bounds = None
        if frame.request.mode == "program":
            bounds = (await prepare(hub, ticket.identity(), frame.request, raw=True)).bounds
        await hub.broker.redeem(ticket, frame.request, instance=hello.instance, bounds=bounds)
