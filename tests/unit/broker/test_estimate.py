"""Estimates follow from what was measured, and the runs they foretell take that long."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fabric.broker.estimate import Estimate, estimate
from fabric.broker.select import Context
from fabric.broker.settings import BrokerSettings
from fabric.messages import Request, Sampling, TokensInput
from fabric.testing.broker_rig import DIGEST, Rig, offer


def ask(rig: Rig, num_requests: int, **changes: Any) -> Estimate:
    request = Request(
        model="smol",
        input=TokensInput(ids=(0,) * 5),
        sampling=Sampling(max_tokens=4, temperature=0.0),
        tier=changes.pop("tier", "standard"),
    )
    context = Context(
        model="smol@1",
        digest=DIGEST,
        offers={site: offer(site) for site in changes.pop("sites", ("alpha", "beta"))},
        remaining_s=300.0,
        settings=BrokerSettings(),
    )
    return estimate(request, num_requests, context, rig.state.fleet, now=rig.now)


def serve(rig: Rig, num_runs: int, seconds: float, *, site: str = "alpha") -> None:
    """Answer requests one after the other, each in so many seconds."""
    for number in range(num_runs):
        task = rig.admit(f"{site}_{number}_{seconds}", sites=(site,))
        assert task is not None
        rig.accept(task)
        rig.now += seconds / 4
        for position in range(4):
            rig.token(task, position, "length" if position == 3 else None)
            rig.now += seconds / 4 if position < 3 else 0.0
        rig.finish(task, 4)


def test_a_run_takes_its_requests_over_what_full_replicas_answer() -> None:
    rig = Rig("alpha")
    serve(rig, 40, 1.0)
    found = ask(rig, 100_000)
    [alpha, beta] = found.sites
    assert alpha.is_measured
    # Alone a request takes 1 s; a row of a full batch of four takes up to twice as long.
    assert 4 / 2.2 <= alpha.requests_per_s <= 4 / 0.9
    assert alpha.duration is not None
    assert alpha.duration.p50_s == pytest.approx(100_000 / alpha.requests_per_s)
    assert (beta.num_replicas, beta.duration) == (0, None)
    assert found.duration == alpha.duration
    assert found.charge_usu == 100_000 * offer("alpha").max_charge_usu


def test_quantiles_are_those_of_the_answers_that_were_timed() -> None:
    rig = Rig("alpha")
    for _ in range(16):
        serve(rig, 1, 1.0)
        rig.now += 0.1
        serve(rig, 1, 2.0)
        rig.now += 0.1
    duration = ask(rig, 10_000).duration
    assert duration is not None
    assert duration.p10_s < duration.p90_s
    assert 1.3 <= duration.p90_s / duration.p10_s <= 3.0


def test_sites_share_a_run_by_what_they_answer() -> None:
    rig = Rig("alpha", "beta")
    serve(rig, 20, 1.0, site="alpha")
    serve(rig, 20, 4.0, site="beta")
    found = ask(rig, 100_000)
    [alpha, beta] = found.sites
    assert 2.5 <= alpha.requests_per_s / beta.requests_per_s <= 5.5
    assert found.requests_per_s == pytest.approx(alpha.requests_per_s + beta.requests_per_s)
    assert alpha.duration is not None
    assert found.duration is not None
    assert found.duration.p50_s < alpha.duration.p50_s


def test_what_was_measured_long_ago_still_counts() -> None:
    rig = Rig("alpha")
    serve(rig, 20, 8.0)
    before = ask(rig, 1_000)
    rig.tick(3_600.0)
    assert ask(rig, 1_000).requests_per_s == pytest.approx(before.requests_per_s)


def test_batch_work_gets_a_part_of_the_rows() -> None:
    rig = Rig("alpha")
    serve(rig, 20, 1.0)
    assert [ask(rig, 10, tier=tier).sites[0].num_rows for tier in ("standard", "batch")] == [4, 3]


def test_one_request_takes_no_less_than_one_request_takes() -> None:
    rig = Rig("alpha")
    serve(rig, 20, 1.0)
    duration = ask(rig, 1).duration
    assert duration is not None
    assert 0.5 <= duration.p50_s <= 2.0


def test_a_fleet_that_nobody_measured_says_so() -> None:
    rig = Rig("alpha")
    found = ask(rig, 10**12)
    assert not found.is_measured
    assert found.duration is not None
    assert math.isfinite(found.duration.p90_s)


def test_replicas_that_take_nothing_count_for_nothing() -> None:
    rig = Rig("alpha")
    rig.leave("alpha-1")
    found = ask(rig, 1_000)
    assert (found.duration, found.requests_per_s, found.charge_usu) == (None, 0.0, 0)
