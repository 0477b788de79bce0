"""What the broker is asked of programs, and told of instances that are on their way."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

from fabric.auth import Identity
from fabric.broker.accounts import OwnAccounts
from fabric.broker.admit import Admission
from fabric.broker.programs import ProgramBounds, get_bounds
from fabric.broker.signals import ReplicaExpected, ReplicaGivenUp, StateEvent
from fabric.broker.state import BrokerState
from fabric.messages import InstanceState, PointManifest, Request
from fabric.programs import Checked


class ProgramDesk:
    """Points, bounds and prices. Called on the broker's event loop."""

    def __init__(self, state: BrokerState, admission: Admission) -> None:
        self._state = state
        self._admission = admission

    @contextmanager
    def counted(self, identity: Identity) -> Iterator[None]:
        """Count a program that is being checked as one in flight.

        Raises:
            TooManyRequests: As many are in flight as may be.
        """
        with self._admission.counted(identity):
            yield

    def points(self, digest: str, sites: Collection[str]) -> PointManifest | None:
        """Return where programs may read and write in a version, if an instance of it is there.

        Args:
            digest: The version's.
            sites: Where the caller's requests may run: what others' own instances say of a model
                counts for nobody else.
        """
        there = (one.hello for one in self._state.fleet if one.state is not InstanceState.LOST)
        told = (one.points for one in there if one.digest == digest and one.site in sites)
        return next((points for points in told if points is not None), None)

    def bound(
        self, checked: Checked, manifest: PointManifest, request: Request, *, program: str
    ) -> ProgramBounds:
        """Return what a checked program may take, by the rates of the replicas that may run it.

        Args:
            checked: What was found valid.
            manifest: The points it was checked against.
            request: What is asked.
            program: The program's digest, as it was sent.
        """
        snapshots = self._state.fleet.snapshots(time.monotonic())
        return get_bounds(
            checked,
            manifest,
            [one for one in snapshots if one.digest == manifest.digest],
            digest=program,
            prompt_tokens=request.prompt_tokens_bound(),
            tier=request.tier,
        )

    async def quote(
        self, identity: Identity, request: Request, bounds: ProgramBounds
    ) -> Mapping[str, int]:
        """Return the most a program would cost at each site, in micro-SU.

        Raises:
            FabricError: As ``Broker.submit`` does, but for the balance.
        """
        context = await self._admission.prospect(identity, request, bounds)
        return {site: offer.max_charge_usu for site, offer in context.offers.items()}

    def payer(self, run_id: str, instance: str) -> tuple[str, int] | None:
        """Return whose a program is that is at an instance now, and the most it may save."""
        run = self._state.runs.get(run_id)
        if run is None or run.instance != instance or run.ticket.bounds is None:
            return None
        return run.ticket.project, run.ticket.bounds.hook_bytes_out


class ArrivalDesk:
    """What is told of instances by those who start them: when they join, and what is left to pay
    for them. Called on the broker's event loop.

    Args:
        feed: Gives the state an event.
        accounts: What pays for users' own instances.
    """

    def __init__(self, feed: Callable[[StateEvent], None], accounts: OwnAccounts) -> None:
        self._feed = feed
        self.accounts = accounts

    def expect(self, instance: str, *, site: str, model: str, ready_in_s: float) -> None:
        """Note when an instance should join: requests that nothing else can serve wait for it.

        Whoever starts it says so again and again; what was not repeated for a minute is forgotten.

        Args:
            instance: The one that will join.
            site: Where.
            model: What it will run, as ``name@revision``.
            ready_in_s: Seconds until it should have joined.
        """
        self._feed(
            ReplicaExpected(
                now=time.monotonic(),
                instance=instance,
                site=site,
                model=model,
                ready_in_s=ready_in_s,
            )
        )

    def give_up(self, instance: str) -> None:
        """Note that an instance will not join; one that was not expected is no error."""
        self._feed(ReplicaGivenUp(now=time.monotonic(), instance=instance))
