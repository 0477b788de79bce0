"""Replicas that are on their way: asked for and not here yet, as those who start them tell."""

from __future__ import annotations

from collections.abc import Mapping

from fabric.broker.cost import barred_site
from fabric.broker.facts import Context, ReplicaSnapshot
from fabric.broker.replicas import Fleet
from fabric.broker.signals import ReplicaExpected
from fabric.errors import NoReplica
from fabric.messages import Request

MEMORY_S = 60.0
"""A replica that nobody has told of for so long is expected no more: its launcher was killed."""

MIN_RETRY_S = 1.0


class Arrivals:
    """All replicas that are on their way, by instance.

    Args:
        fleet: Those that are there, which others of their version will be like.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._coming: dict[str, ReplicaExpected] = {}

    def __bool__(self) -> bool:
        return bool(self._coming)

    def expect(self, told: ReplicaExpected) -> None:
        """Note when a replica is expected, in place of what was told of it before; one that is
        there is not expected."""
        if self._fleet.get(told.instance) is None:
            self._coming[told.instance] = told

    def forget(self, instance: str) -> None:
        """It is here, or will not come; one that was not expected is no error."""
        self._coming.pop(instance, None)

    def tick(self, now: float) -> None:
        """Forget those that nobody tells of any more."""
        for instance, one in list(self._coming.items()):
            if now - one.now > MEMORY_S:
                del self._coming[instance]

    def of(self, context: Context, now: float) -> tuple[ReplicaSnapshot, ...]:
        """Return those of a choice's version as they should be once they are there.

        One that is overdue is left out: nobody knows when it comes.
        """
        newcomers = (
            self._fleet.newcomer(told.instance, told.site, context.digest, due_in_s)
            for told in self._coming.values()
            if told.model == context.model and (due_in_s := told.now + told.ready_in_s - now) > 0
        )
        return tuple(one for one in newcomers if one is not None)

    def waits_s(self, request: Request, context: Context, now: float) -> Mapping[str, float]:
        """Return in how many seconds each replica is expected that could serve the request.

        One that is overdue is expected at once. What else it might lack is seen when it is here.
        """
        return {
            instance: max(0.0, one.now + one.ready_in_s - now)
            for instance, one in self._coming.items()
            if one.model == context.model and barred_site(request, one.site, context) is None
        }

    def in_time(self, request: Request, context: Context, now: float) -> bool:
        """Return whether one is expected before the request's deadline."""
        waits_s = self.waits_s(request, context, now).values()
        return any(wait_s < context.remaining_s for wait_s in waits_s)

    def told_in(
        self, error: NoReplica, request: Request, context: Context, now: float
    ) -> NoReplica:
        """Return an error that says when to come again, if what comes is too late for this."""
        waits_s = self.waits_s(request, context, now)
        if not waits_s:
            return error
        told = error.detail["reasons"]
        reasons = dict(told) if isinstance(told, dict) else {}
        for instance, wait_s in waits_s.items():
            reasons[instance] = f"it is on its way and expected in {wait_s:.0f} s"
        return NoReplica(
            model=context.model,
            reasons=reasons,
            retry_after_s=max(MIN_RETRY_S, round(min(waits_s.values()))),
        )
