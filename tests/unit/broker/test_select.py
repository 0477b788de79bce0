"""Where a request runs: tables of cases, and properties of the choice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabric.broker.select import Context, ReplicaSnapshot, may_come, select
from fabric.errors import NoReplica
from fabric.messages import InstanceState, Placement, Request, Sampling, TokensInput
from fabric.testing import choices
from fabric.testing.choices import DIGEST, context, offer, request

MIB = 2**20


def replica(site: str, **changes: Any) -> ReplicaSnapshot:
    return choices.replica(f"{site}-1", site, **changes)


BOTH = (replica("alpha"), replica("beta"))


@pytest.mark.parametrize("home", ["alpha", "beta"])
def test_locality_decides_where_all_else_is_equal(home: str) -> None:
    placement = select(request(data_site=home, data_bytes=50 * MIB), BOTH, context())
    assert placement.site == home
    assert placement.reason.startswith(f"{home}: data is there; ")
    assert " s against " in placement.reason


@pytest.mark.parametrize(("rich", "poor"), [("alpha", "beta"), ("beta", "alpha")])
def test_allocation_decides_where_all_else_is_equal(rich: str, poor: str) -> None:
    means = context(offer(rich, scarcity=1.01), offer(poor, scarcity=101.0))
    placement = select(request(), BOTH, means)
    assert placement.site == rich
    assert "the balance is less scarce there" in placement.reason


def test_the_fastest_policy_does_not_look_at_the_price() -> None:
    means = context(offer("alpha", scarcity=500.0), offer("beta"))
    busy = (replica("alpha"), replica("beta", num_busy=12))
    assert select(request(policy="fastest"), busy, means).site == "alpha"
    assert select(request(policy="cheapest"), busy, means).site == "beta"


def test_a_queue_sends_the_request_elsewhere() -> None:
    placement = select(request(), (replica("alpha", num_busy=40), replica("beta")), context())
    assert placement.site == "beta"
    assert "it is less busy" in placement.reason


def test_observed_speed_counts() -> None:
    fast = (replica("alpha", decode_tokens_per_s=5.0), replica("beta", decode_tokens_per_s=80.0))
    assert select(request(), fast, context()).site == "beta"


def test_recent_failures_and_a_failed_try_count_against_a_replica() -> None:
    failing = (replica("alpha", failures=2.0), replica("beta"))
    assert select(request(), failing, context()).site == "beta"
    tried = context(tried=frozenset({"beta-1"}))
    assert select(request(), BOTH, tried).site == "alpha"


def test_a_tie_goes_to_the_replica_with_fewer_requests_in_flight() -> None:
    replicas = (replica("alpha", num_in_flight=2), replica("beta", num_in_flight=1))
    assert all(
        select(request(id=f"run_{number}"), replicas, context()).site == "beta"
        for number in range(20)
    )


def test_equal_replicas_share_the_requests() -> None:
    sites = [select(request(id=f"run_{n}"), BOTH, context()).site for n in range(200)]
    assert 60 < sites.count("alpha") < 140


EXCLUSIONS: dict[str, tuple[ReplicaSnapshot, dict[str, Any], Context, str]] = {
    "digest": (replica("beta", digest="sha256:bb"), {}, context(), "another model version"),
    "site": (replica("beta"), {"sites": ("alpha",)}, context(), "may run only at alpha"),
    "data policy": (
        replica("beta"),
        {"policy": "local-only", "data_site": "alpha"},
        context(),
        "may not leave alpha",
    ),
    "draining": (replica("beta", state=InstanceState.DRAINING), {}, context(), "draining"),
    "lost": (replica("beta", state=InstanceState.LOST), {}, context(), "lost"),
    "ejected": (replica("beta", ejected=True), {}, context(), "failures in a row"),
    "rows": (
        replica("beta", max_rows=2),
        {"sampling": Sampling(n=3)},
        context(),
        "3 choices",
    ),
    "context": (
        replica("beta", context_tokens=8),
        {"input": TokensInput(ids=(1, 2, 3)), "sampling": Sampling(max_tokens=6)},
        context(),
        "context is 8 tokens and 9 are needed",
    ),
    "no price": (replica("beta"), {}, context(offer("alpha")), "no price"),
    "no allocation": (
        replica("beta"),
        {},
        context(offer("alpha"), offer("beta", allocation=None)),
        "no allocation for beta",
    ),
    "balance": (
        replica("beta"),
        {},
        context(offer("alpha"), offer("beta", available_usu=999)),
        "has 999 micro-SU available",
    ),
    "deadline": (
        replica("beta", num_busy=400),
        {},
        context(remaining_s=3.0),
        "deadline is in 3.0 s",
    ),
    "end of the block": (replica("beta", ends_in_s=0.5), {}, context(), "its block ends"),
}


@pytest.mark.parametrize("case", EXCLUSIONS)
def test_a_filter_excludes_and_says_why(case: str) -> None:
    barred, asked, means, words = EXCLUSIONS[case]
    # The barred replica would win on every cost.
    placement = select(request(**asked), (replica("alpha", num_in_flight=9), barred), means)
    assert placement.site == "alpha"
    assert [one.instance for one in placement.candidates] == ["alpha-1", "beta-1"]
    excluded = placement.candidates[1]
    assert excluded.excluded is not None
    assert words in excluded.excluded
    assert excluded.total_s is None
    with pytest.raises(NoReplica) as refused:
        select(request(**asked), (barred,), means)
    assert words in refused.value.detail["reasons"]["beta-1"]  # type: ignore[index]


def test_what_the_request_holds_already_counts_as_available() -> None:
    spent = context(
        offer("alpha", available_usu=0), held_allocation="allocation:astro:*", held_usu=1_000
    )
    assert select(request(), (replica("alpha"),), spent).site == "alpha"


def test_only_passing_reasons_are_worth_a_wait() -> None:
    lost = replica("alpha", state=InstanceState.LOST)
    assert may_come(request(), (lost,), context())
    assert not may_come(request(sites=("beta",)), (lost,), context())
    assert not may_come(request(), (replace(lost, digest="sha256:bb"),), context())
    assert not may_come(request(), (), context())


snapshots = st.lists(
    st.builds(
        replica,
        st.sampled_from(["alpha", "beta", "gamma"]),
        digest=st.sampled_from([DIGEST, "sha256:bb"]),
        state=st.sampled_from([InstanceState.READY, InstanceState.DRAINING, InstanceState.LOST]),
        ejected=st.booleans(),
        num_busy=st.integers(0, 40),
        num_in_flight=st.integers(0, 10),
        decode_tokens_per_s=st.floats(0, 200),
        prefill_tokens_per_s=st.floats(0, 5000),
        failures=st.floats(0, 10),
        ends_in_s=st.none() | st.floats(0, 100),
    ),
    min_size=1,
    max_size=6,
).map(lambda found: [replace(one, instance=f"i{index}") for index, one in enumerate(found)])

contexts = st.builds(
    lambda amounts, remaining_s: context(
        *(
            offer(site, available_usu=available, scarcity=scarcity)
            for site, (available, scarcity) in zip(("alpha", "beta", "gamma"), amounts, strict=True)
        ),
        remaining_s=remaining_s,
    ),
    st.lists(st.tuples(st.integers(0, 5_000), st.floats(1, 1000)), min_size=3, max_size=3),
    st.floats(0.01, 300),
)

requests = st.builds(
    request,
    id=st.text("0123456789abcdef", min_size=4, max_size=8),
    policy=st.sampled_from(["balanced", "fastest", "cheapest", "local-only"]),
    data_site=st.sampled_from(["alpha", "beta"]),
    data_bytes=st.integers(0, 2**33),
    sites=st.none() | st.just(("alpha", "gamma")),
)


@given(requests, snapshots, contexts)
def test_the_choice_is_never_excluded_and_always_the_same(
    asked: Request, found: list[ReplicaSnapshot], means: Context
) -> None:
    try:
        placement = select(asked, found, means)
    except NoReplica as error:
        refused = error
    else:
        check_choice(placement, asked, found, means)
        assert select(asked, found, means) == placement
        assert select(asked, found[::-1], means).instance == placement.instance
        return
    reasons = refused.detail["reasons"]
    assert isinstance(reasons, dict)
    assert set(reasons) == {one.instance for one in found}


def check_choice(
    placement: Placement, asked: Request, found: list[ReplicaSnapshot], means: Context
) -> None:
    chosen = next(one for one in found if one.instance == placement.instance)
    assert chosen.digest == placement.digest == means.digest
    assert chosen.state is InstanceState.READY
    assert not chosen.ejected
    assert asked.sites is None or chosen.site in asked.sites
    assert asked.policy != "local-only" or chosen.site == asked.data_site
    paid = means.offers[chosen.site]
    assert paid.available_usu >= paid.max_charge_usu
    for candidate in placement.candidates:
        assert (candidate.excluded is None) == (candidate.total_s is not None)


@given(requests, snapshots, contexts, st.integers(0, 2**33))
def test_more_data_never_drives_a_request_away_from_its_data(
    asked: Request, found: list[ReplicaSnapshot], means: Context, more_bytes: int
) -> None:
    try:
        before = select(asked, found, means)
    except NoReplica:
        return
    more = asked.model_copy(update={"data_bytes": asked.data_bytes + more_bytes})
    after = select(more, found, means)
    if before.site == asked.data_site:
        assert after.site == asked.data_site
