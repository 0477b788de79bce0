"""Two sites behind real endpoint agents, and what happens when parts of Globus Compute die.

Alpha's instance dials the hub; beta's is reached by tasks alone. The engines answer after fixed
delays, so that what is measured here is the way and not the model.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fabric.cli import federation as local
from fabric.cli import processes
from fabric.config import SiteModel, SiteSpec, load_site, shipped_sites
from fabric.ledger import Ledger
from fabric.sdk import Completion, Fabric
from fabric.sql import Database
from fabric.testing.globus import Globus
from fabric.testing.globus.federation import GlobusFederation, Way, running_federation
from fabric.testing.instance import MODULE
from fabric.testing.processes import wait_ended

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

COMES_BACK_S = 120.0


@pytest.fixture
def template() -> SiteSpec:
    site = load_site(shipped_sites()["local-globus"])
    model = SiteModel(name="fixed", source="fixed-delay:token_s=0.05", context_tokens=4096)
    return site.model_copy(update={"models": (model,)})


@pytest.fixture
def federation(
    globus: Globus, template: SiteSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[GlobusFederation]:
    monkeypatch.setenv("FABRIC_INSTANCE_MODULE", MODULE)
    ways: dict[str, Way] = {"alpha": "session", "beta": "compute"}
    with running_federation(globus, tmp_path, template, ways) as running:
        yield running


def test_one_life_behind_endpoints(federation: GlobusFederation, globus: Globus) -> None:
    running, violations = federation.running, globus.violations()
    with Fabric(running.base_url, running.api_key, num_retries=0) as fabric:
        _both_ways_give_the_same_answer(fabric)
        _many_at_once_are_charged_once_each(fabric)
        _core_endpoint_restarts_under_a_stream(fabric, federation)
        _service_is_away_for_20_s(fabric, globus)
        _user_endpoint_is_killed_under_tasks(fabric, federation)
        _hub_is_killed_and_reaches_both_again(fabric, federation)
        _endpoint_goes_offline(fabric, federation)
    with Database(federation.state.database_url) as database:
        Ledger(database).verify()
    assert globus.violations() == violations


def ask(fabric: Fabric, site: str, *, max_tokens: int = 8, **options: object) -> Completion:
    return fabric.complete(
        "a b c", max_tokens=max_tokens, temperature=0, sites=[site], deadline_s=120, **options
    )  # type: ignore[arg-type]


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in processes.poll(COMES_BACK_S, interval_s=0.2):
        if condition():
            return
    raise AssertionError(f"not within {COMES_BACK_S:g} s")


def all_ready(fabric: Fabric) -> bool:
    return all(site.state == "ready" for site in fabric.sites())


def _both_ways_give_the_same_answer(fabric: Fabric) -> None:
    alpha, beta = ask(fabric, "alpha"), ask(fabric, "beta")
    assert (alpha.site, beta.site) == ("alpha", "beta")
    assert alpha.text == beta.text != ""
    assert alpha.charge_usu == beta.charge_usu > 0
    with fabric.stream("a b c", max_tokens=8, temperature=0, sites=["alpha"]) as stream:
        assert [chunk.text for chunk in stream if chunk.text] != []
    assert stream.result.text == alpha.text


def _many_at_once_are_charged_once_each(fabric: Fabric) -> None:
    before = fabric.usage().allocations
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda _: ask(fabric, "beta"), range(8)))
    spent = {a.site: a.available_usu for a in before if a.site == "beta"}["beta"] - next(
        a.available_usu for a in fabric.usage().allocations if a.site == "beta"
    )
    assert spent == sum(answer.charge_usu for answer in answers)


def _core_endpoint_restarts_under_a_stream(fabric: Fabric, federation: GlobusFederation) -> None:
    alpha = federation.endpoints["alpha"]
    with fabric.stream(
        "a b c", max_tokens=100, temperature=0, data_site="alpha", data_bytes=10**11
    ) as stream:
        next(iter(stream))
        assert stream.site == "alpha"
        alpha.kill_core()  # takes its user endpoints along
        text = "".join(chunk.text for chunk in stream)
    assert (stream.result.site, stream.result.attempts) == ("beta", 2)
    assert len(text.split()) > 90
    alpha.start_core()
    wait_until(lambda: all_ready(fabric))
    assert ask(fabric, "alpha").site == "alpha"


def _service_is_away_for_20_s(fabric: Fabric, globus: Globus) -> None:
    with ThreadPoolExecutor(1) as threads:
        under_way = threads.submit(ask, fabric, "beta", max_tokens=60)
        time.sleep(1)  # let the task get on its way; either side of the outage is fine
        globus.stop_service()
        gone_at = time.monotonic()
        try:
            assert ask(fabric, "alpha").site == "alpha"
            while time.monotonic() < gone_at + 20:
                time.sleep(0.5)
        finally:
            globus.start_service()
        assert under_way.result().site == "beta"


def _user_endpoint_is_killed_under_tasks(fabric: Fabric, federation: GlobusFederation) -> None:
    wait_until(lambda: all_ready(fabric))
    beta = federation.endpoints["beta"]
    with ThreadPoolExecutor(4) as threads:
        under_way = [
            threads.submit(
                fabric.complete,
                "a b c",
                max_tokens=200,
                temperature=0,
                data_site="beta",
                data_bytes=10**11,
                deadline_s=300,
            )
            for _ in range(4)
        ]
        wait_until(lambda: num_in_flight(fabric, "beta") == 4)
        orphans = beta.kill_user_endpoints()
        assert orphans, "an interchange and workers at least"
        answers = [future.result() for future in under_way]
    assert {answer.site for answer in answers} <= {"alpha", "beta"}
    assert all(answer.attempts >= 2 for answer in answers), answers
    runs = {run.id for run in fabric.runs(limit=20)}
    charged = [line.run for line in fabric.usage(limit=50).lines if line.kind == "charge"]
    for answer in answers:
        assert answer.run_id in runs
        assert charged.count(answer.run_id) == 1
    assert not wait_ended(orphans, timeout_s=30)
    wait_until(lambda: all_ready(fabric))
    assert ask(fabric, "beta").site == "beta"


def _hub_is_killed_and_reaches_both_again(fabric: Fabric, federation: GlobusFederation) -> None:
    os.kill(federation.running.hub.pid, signal.SIGKILL)
    local.restart_hub(federation.state, federation.running)
    wait_until(lambda: all_ready(fabric))
    for site in ("alpha", "beta"):
        assert ask(fabric, site).site == site


def _endpoint_goes_offline(fabric: Fabric, federation: GlobusFederation) -> None:
    """What was under way moves as soon as the hub knows, and nothing else is sent there."""
    near_beta = {"data_site": "beta", "data_bytes": 10**11}
    with ThreadPoolExecutor(1) as threads:
        under_way = threads.submit(
            fabric.complete, "a b c", max_tokens=400, temperature=0, deadline_s=300, **near_beta
        )
        wait_until(lambda: num_in_flight(fabric, "beta") == 1)
        for process in federation.endpoints["beta"].processes():
            process.kill()
        wait_until(lambda: not all_ready(fabric))
        known_at = time.monotonic()
        wait_until(lambda: num_in_flight(fabric, "alpha") == 1)
        assert time.monotonic() - known_at < 2
        answer = fabric.complete("a b c", max_tokens=4, temperature=0, **near_beta)
        assert (answer.site, answer.attempts) == ("alpha", 1)
        assert under_way.result().site == "alpha"


def num_in_flight(fabric: Fabric, name: str) -> int:
    (site,) = [site for site in fabric.sites() if site.name == name]
    return sum(replica.num_in_flight for replica in site.replicas)
