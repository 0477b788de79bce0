"""Maintenance, limits of requests in flight and links that were observed, in the choice."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from fabric.auth import Identity
from fabric.broker.links import Links
from fabric.broker.pool import Pool
from fabric.broker.select import Closure, Context, Offer, decide, may_come, select
from fabric.broker.settings import BrokerSettings
from fabric.broker.signals import Admitted, SendTask
from fabric.errors import NoReplica
from fabric.messages import Request, RunCompleted, Sampling
from fabric.testing import choices
from fabric.testing.broker_rig import Rig, make_ticket, offer, only
from fabric.testing.broker_rig import admit as admit_one
from fabric.testing.choices import replica
from fabric.testing.runs import Ask, last

UNTIL = datetime(2027, 1, 11, 18, 0, tzinfo=UTC)
NOW = 1_000.0


def closure(begins_in_s: float, ends_in_s: float) -> Closure:
    return Closure(begins_s=NOW + begins_in_s, ends_s=NOW + ends_in_s, until=UNTIL)


def context(*offers: Offer, **changes: Any) -> Context:
    return choices.context(*offers, settings=BrokerSettings(explore=0.0), now=NOW, **changes)


def request(**changes: Any) -> Request:
    return choices.request(**{"sampling": Sampling(max_tokens=60), **changes})


BOTH = (replica("a", "alpha"), replica("b", "beta", num_busy=16))


def test_a_site_in_maintenance_takes_nothing_and_says_until_when() -> None:
    means = context(offer("alpha", closures=(closure(-10.0, 3_600.0),)), offer("beta"))
    placement = select(request(), BOTH, means)
    assert placement.site == "beta"
    assert placement.candidates[0].excluded == "alpha is in maintenance until 2027-01-11 18:00 UTC"
    with pytest.raises(NoReplica, match="in maintenance until"):
        select(request(), BOTH[:1], means)


def test_before_maintenance_only_what_will_be_done_is_sent() -> None:
    # 60 tokens at 30 a second and a prompt: two seconds.
    soon = context(offer("alpha", closures=(closure(1.5, 3_600.0),)), offer("beta"))
    placement = select(request(), BOTH, soon)
    assert placement.site == "beta"
    assert placement.candidates[0].excluded == "maintenance of alpha begins in 2 s"
    assert select(request(sampling=Sampling(max_tokens=20)), BOTH, soon).site == "alpha"
    later = context(offer("alpha", closures=(closure(60.0, 3_600.0),)), offer("beta"))
    assert select(request(), BOTH, later).site == "alpha"


def test_after_maintenance_the_site_serves_again_by_itself() -> None:
    over = context(offer("alpha", closures=(closure(-20.0, -10.0),)), offer("beta"))
    assert select(request(), BOTH, over).site == "alpha"


def test_a_full_site_is_passed_over_and_its_place_may_come() -> None:
    full = replica("a", "alpha", num_in_flight=2)
    means = context(offer("alpha", max_in_flight=2), offer("beta"))
    placement = select(request(), (full, BOTH[1]), means)
    assert placement.site == "beta"
    assert placement.candidates[0].excluded == "alpha takes 2 requests at once and has as many"
    with pytest.raises(NoReplica, match="alpha takes 2 requests at once"):
        select(request(), (full,), means)
    assert may_come(request(), (full,), means)
    assert not may_come(request(sites=("beta",)), (full,), means)
    assert select(request(), (replace(full, num_in_flight=1), BOTH[1]), means).site == "alpha"


def test_the_limit_counts_all_replicas_of_the_site() -> None:
    fleet = [replica(f"a{n}", "alpha", num_in_flight=1) for n in range(4)]
    means = context(offer("alpha", max_in_flight=4))
    assert not _places(fleet, means)
    pool = Pool(fleet)
    pool.drop("a3")
    assert _places(pool, means)
    pool.put(replica("a1", "alpha", num_in_flight=2))
    assert not _places(pool, means)


def _places(fleet: Any, means: Context) -> bool:
    try:
        decide(request(), fleet, means)
    except NoReplica:
        return False
    return True


def test_what_a_full_site_leaves_waiting_goes_when_a_place_is_free() -> None:
    rig = Rig("alpha")
    offers = [offer("alpha", max_in_flight=1)]
    first = admit_one(rig, run_id="run_1", offers=offers)
    for name in ("run_2", "run_3"):
        ticket = make_ticket(name, offers=offers)
        out = rig.feed(Admitted(now=rig.now, started_at=rig.now, ticket=ticket))
        assert not [one for one in out if isinstance(one, SendTask)]
    rig.token(first, 0, "stop")
    second = only([*rig.finish(first, 1), *rig.tick(0.1)], SendTask)
    assert second.run_id == "run_2"
    rig.token(second, 0, "stop")
    assert only([*rig.finish(second, 1), *rig.tick(0.1)], SendTask).run_id == "run_3"


def test_a_link_is_a_running_mean_of_what_was_moved() -> None:
    links = Links()
    links.observe("alpha", "beta", 100_000_000, 1.0)
    assert links.bytes_per_s == {"alpha": {"beta": 100e6}}
    links.observe("alpha", "beta", 100_000_000, 0.5)
    assert links.bytes_per_s["alpha"]["beta"] == pytest.approx(120e6)


@pytest.mark.parametrize(
    ("num_bytes", "seconds"), [(1_000, 1.0), (10**9, 0.0), (10**9, -1.0), (10**9, 1e-6)]
)
def test_what_is_too_small_or_too_fast_says_nothing_of_a_link(
    num_bytes: int, seconds: float
) -> None:
    links = Links()
    links.observe("alpha", "beta", num_bytes, seconds)
    assert not links.bytes_per_s


def test_a_link_that_was_slow_sends_the_next_data_elsewhere() -> None:
    rig = Rig("alpha", "beta", bandwidth_bytes_per_s=1e9)
    offers = [offer("alpha"), offer("beta", expected_charge_usu=500)]
    data: dict[str, Any] = {"data_site": "gamma", "data_bytes": 10**9, "offers": offers}
    sent = admit_one(rig, run_id="run_1", **data)
    assert sent.instance == "alpha-1"
    rig.tick(20.0)
    rig.token(sent, 0, "stop")
    rig.finish(sent, 1)
    assert admit_one(rig, run_id="run_2", **data).instance == "beta-1"
    assert admit_one(rig, run_id="run_3", offers=offers).instance == "alpha-1"


async def test_what_administrators_set_reaches_the_choice(
    hub: Any, caller: Identity, ask: Ask, read: Any
) -> None:
    hub.grant()
    now = datetime.now(UTC)
    hub.catalog.set_max_in_flight("beta", 1)
    window = hub.catalog.add_maintenance(
        "alpha", starts_at=now - timedelta(hours=1), ends_at=now + timedelta(hours=1)
    )
    broker = await hub.broker(patience_s=60.0)
    broker.attach(hub.channel("alpha"))
    broker.attach(hub.channel("beta", first_token_s=0.05))
    assert (await broker.explain(caller, ask())).site == "beta"
    runs = [await broker.submit(caller, ask()) for _ in range(3)]
    most = 0
    ends = []
    for run in runs:
        ends.append(last(await read(run)))
        most = max(most, *(one.num_in_flight for one in broker.replicas()))
    assert all(isinstance(end, RunCompleted) and end.site == "beta" for end in ends)
    assert most <= 1
    hub.catalog.delete_maintenance("alpha", window.id)
    table = (await broker.explain(caller, ask())).candidates
    assert [one.excluded for one in table] == [None, None]


async def test_a_balance_that_will_not_last_is_dear_in_the_hub(
    hub: Any, caller: Identity, ask: Ask
) -> None:
    general = hub.grant()
    hub.ledger.hold("run_0", allocation=general, amount_usu=900_000, lease_s=60.0)
    hub.ledger.settle("run_0", 900_000, site="alpha", model="fixed@1")
    prices = []
    for ends_at in (None, datetime.now(UTC) + timedelta(days=10)):
        hub.ledger.modify_allocation(general, ends_at=ends_at)
        broker = await hub.broker()
        broker.attach(hub.channel("alpha"))
        (line,) = (await broker.explain(caller, ask())).candidates
        prices.append(line.cost_s["price"])
    # At 900,000 a day for ten days, 90 times what is left would be needed.
    assert prices[1] / prices[0] == pytest.approx(90.0, rel=0.01)
