"""The simulated centres are as their files and data sheets say."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean

import pytest

from fabric.ledger import charge_usu, max_charge_usu
from fabric.messages import Usage
from fabric.testing.simulation import Arrival, SiteSketch, make_federation, make_trace, simulate
from fabric.testing.simulation.federation import MACHINES, units_per_device_hour
from fabric.testing.simulation.prices import Prices

CHARGES = {
    # node-hours: devices that a job sees in a node
    "alcf-aurora": 1 / 12,
    "alcf-polaris": 1 / 4,
    "alcf-sophia": 1 / 8,
    "nersc-perlmutter": 1 / 4,
    "olcf-frontier": 1 / 8,
    # SU: 1 a node of one GH200, 4 a node of four H100
    "tacc-vista": 1.0,
    "tacc-stampede3": 1.0,
    # SU: one a GPU and hour
    "ncsa-delta": 1.0,
    "ncsa-deltaai": 1.0,
    "purdue-anvil": 1.0,
}


def test_charges_are_those_that_the_centres_publish() -> None:
    assert {one.site: units_per_device_hour(one) for one in MACHINES} == pytest.approx(CHARGES)


def test_a_tokens_price_is_the_device_time_it_takes() -> None:
    sites = {site.name: site for site in make_federation().sites}
    scale = sites["tacc-vista"].output_usu / _output_usu(sites["tacc-vista"], 1.0)
    for name, site in sites.items():
        assert site.output_usu == pytest.approx(scale * _output_usu(site, CHARGES[name]), rel=1e-4)
    assert fmean(site.output_usu for site in sites.values()) == pytest.approx(40.0, abs=0.01)


def _output_usu(site: SiteSketch, su_per_device_hour: float) -> float:
    """Return micro-SU a token, by hand: a full batch generates ``max_rows`` tokens at a time."""
    step_s = (1.0 + site.slowdown) / site.decode_tokens_per_s
    return su_per_device_hour / 3_600 * 1e6 * step_s / site.max_rows


def test_offers_cost_what_the_ledger_charges() -> None:
    rates = {site.name: site.rate() for site in make_federation().sites}
    for prompt, output in ((1, 0), (0, 1), (700, 90), (123_456, 65_432)):
        offers = Prices(rates).offers("astro", (2 * prompt, 3 * output), (prompt, output))
        usage = Usage(prompt_tokens=prompt, output_tokens=output)
        for site, rate in rates.items():
            assert offers[site].expected_charge_usu == charge_usu(rate, "standard", usage)
            most = max_charge_usu(rate, "standard", 2 * prompt, 3 * output)
            assert offers[site].max_charge_usu == most


def test_rates_follow_the_data_sheets() -> None:
    rates = {site.name: site.decode_tokens_per_s for site in make_federation().sites}
    # 16 GB of weights are read for every token.
    assert rates["tacc-vista"] == pytest.approx(0.6 * 4000 / 16)
    assert rates["alcf-polaris"] == pytest.approx(0.6 * 1555 / 16)


def test_links_within_a_centre_are_the_fastest_and_those_behind_a_proxy_the_slowest() -> None:
    world = make_federation()
    assert world.bandwidth("alcf-aurora", "alcf-polaris") == 2e9
    assert world.bandwidth("tacc-vista", "tacc-stampede3") == 2e9
    assert world.bandwidth("tacc-vista", "olcf-frontier") <= 200e6
    assert world.bandwidth("tacc-vista", "ncsa-delta") >= 200e6
    links = world.bandwidths_bytes_per_s
    assert [len(links[one.site]) for one in MACHINES] == [len(MACHINES) - 1] * len(MACHINES)


def test_the_trace_is_read_as_it_comes_and_every_request_ends() -> None:
    world = make_federation(2, seed=3, mtbf_s=None)
    trace = make_trace(world, "bursty", num_requests=120)
    num_read = 0

    def read() -> Iterator[Arrival]:
        nonlocal num_read
        for arrival in trace:
            num_read += 1
            yield arrival

    report = simulate(world, read())
    assert num_read == len(report.ends) == 120
    assert report.num_failed == 0


def test_a_simulation_of_nothing_ends_at_once() -> None:
    nothing: list[Arrival] = []
    assert simulate(make_federation(1), nothing).ends == []
