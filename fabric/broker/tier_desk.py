"""What the broker says of its tiers: what waits, what was kept of their promises, what a run would
take."""

from __future__ import annotations

import time

from fabric.auth import Identity, Rulebook, Rules
from fabric.broker.admit import Admission
from fabric.broker.attainment import Attained, Attainment
from fabric.broker.estimate import Estimate, estimate
from fabric.broker.line import Waiting
from fabric.broker.signals import Outcome
from fabric.broker.state import BrokerState
from fabric.broker.tiers import get_promises
from fabric.errors import FabricError
from fabric.messages import Request


class TierDesk:
    """Waiting, attainment and estimates. Called on the broker's event loop."""

    def __init__(self, state: BrokerState, admission: Admission, rules: Rulebook) -> None:
        self._state = state
        self._admission = admission
        self._rules = rules
        self._heeded = Rules()
        self._attainment = Attainment()

    async def heed(self) -> None:
        """Take what administrators have changed of the tiers. Raises as ``Rulebook.current``."""
        rules = await self._rules.current()
        if rules is not self._heeded:
            self._heeded = rules
            self._state.line.promises = get_promises(rules.tiers)

    def ended(self, outcome: Outcome) -> None:
        """A run is over."""
        self._attainment.ended(time.monotonic(), outcome, self._state.line.promises)

    def refused(self, request: Request, error: BaseException) -> None:
        """A request was not admitted."""
        self._state.line.forget(request.id)
        if isinstance(error, FabricError):
            self._attainment.refused(time.monotonic(), request, error)

    def waiting(self) -> list[Waiting]:
        """Return what waits for a row at the hub."""
        return self._state.line.waiting()

    def attained(self) -> list[Attained]:
        """Return how far the tiers' promises were kept."""
        return self._attainment.report(time.monotonic(), self._state.line.promises)

    async def estimate(self, identity: Identity, request: Request, num_requests: int) -> Estimate:
        """Return what many requests like this one would take and cost. Nothing is held or sent.

        Args:
            identity: Who asks.
            request: One of them; its prompt in tokens, its ``max_tokens`` what each generates.
            num_requests: How many there are.

        Raises:
            FabricError: As ``Broker.submit`` does, but for the balance.
        """
        context, now = await self._admission.prospect(identity, request), time.monotonic()
        context = self._state.experience.informed(now, request, context)
        return estimate(request, num_requests, context, self._state.fleet, now=now)
