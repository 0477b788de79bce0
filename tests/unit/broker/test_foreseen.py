"""The choice made at admission: it is the one that is carried out, unless something has changed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fabric.broker.pool import Replicas
from fabric.broker.select import Context, Decision, decide
from fabric.broker.signals import ReplicaReported
from fabric.broker.state import BrokerState
from fabric.messages import Load, Request
from fabric.testing.broker_rig import LATE, Rig, foresee


class Counted:
    """A rig that keeps what was decided, and for whom."""

    def __init__(self) -> None:
        self.decided: list[str] = []
        self.rig = Rig(eject_after=1)
        self.rig.state = BrokerState(self.rig.settings, started_at=0.0, decide=self._decide)
        for site in ("alpha", "beta"):
            self.rig.join(site)

    def foresee(self, run_id: str) -> None:
        foresee(self.rig, run_id=run_id)

    def admit(self, run_id: str) -> str:
        """Return where it is sent."""
        sent = self.rig.admit(run_id)
        assert sent is not None
        return sent.instance

    def _decide(self, request: Request, replicas: Replicas, context: Context) -> Decision:
        self.decided.append(request.id)
        return decide(request, replicas, context)


def test_what_was_foreseen_is_not_decided_again() -> None:
    hub = Counted()
    hub.foresee("run_1")
    hub.rig.now += 0.002
    first = hub.admit("run_1")
    assert hub.decided == ["run_1"]
    hub.foresee("run_2")
    assert hub.admit("run_2") != first
    assert hub.decided == ["run_1", "run_2"]


def another_goes_first(hub: Counted) -> None:
    hub.admit("run_0")


def one_joins(hub: Counted) -> None:
    hub.rig.join("alpha", "alpha-2")


def one_is_lost(hub: Counted) -> None:
    hub.rig.leave("alpha-1")


def one_is_busier(hub: Counted) -> None:
    busy = Load(num_running=4, num_waiting=4)
    hub.rig.feed(ReplicaReported(now=hub.rig.now, instance="alpha-1", load=busy, draining=False))


def one_drains(hub: Counted) -> None:
    report = ReplicaReported(now=hub.rig.now, instance="alpha-1", load=Load(), draining=True)
    hub.rig.feed(report)


@pytest.mark.parametrize(
    "change", [another_goes_first, one_joins, one_is_lost, one_is_busier, one_drains]
)
def test_it_is_decided_again_when_a_replica_has_changed(change: Callable[[Counted], None]) -> None:
    hub = Counted()
    hub.foresee("run_1")
    change(hub)
    hub.admit("run_1")
    assert hub.decided.count("run_1") == 2


def test_it_is_decided_again_when_time_alone_has_changed_a_replica() -> None:
    hub = Counted()
    task = hub.rig.admit("run_0", sites=("alpha",))
    assert task is not None
    hub.rig.lose(task)
    hub.foresee("run_1")
    hub.rig.now = LATE + hub.rig.settings.eject_s + 1.0
    hub.admit("run_1")
    assert hub.decided.count("run_1") == 2


def test_who_is_lost_before_it_is_carried_out_is_not_sent_anything() -> None:
    hub = Counted()
    hub.foresee("run_1")
    hub.rig.leave("alpha-1")
    assert hub.admit("run_1") == "beta-1"
