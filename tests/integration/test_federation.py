"""A real federation on this machine: a hub, two sites, SmolLM2; and what happens when parts die."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest

from fabric.cli import federation as local
from fabric.cli import processes
from fabric.config import Federation, Settings, StateDir, load_settings, load_site, shipped_sites
from fabric.errors import AlreadyRunning, FabricError, NotRunning, PortInUse, StreamBroken
from fabric.ledger import Ledger
from fabric.sdk import Completion, Fabric, Options
from fabric.sql import Database
from fabric.testing.processes import guarded_by

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PROMPT = "Once upon a time, in a small observatory,"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings({"state_dir": tmp_path / "state", "hub.port": 0})


@pytest.fixture
def plan(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> local.Plan:
    monkeypatch.setenv("FABRIC_HUB_LEASE_S", "4")
    site = load_site(shipped_sites()["local"])
    # In float32 greedy tokens do not depend on the batch, so a moved stream can be compared.
    (model,) = site.models
    options = model.options.model_copy(update={"dtype": "float32"})
    template = site.model_copy(update={"models": (model.model_copy(update={"options": options}),)})
    return local.get_plan(settings, template, ["alpha", "beta"], timeout_s=120)


@pytest.fixture
def up(plan: local.Plan) -> Iterator[Federation]:
    seen: list[dict[str, tuple[str, str]]] = []
    federation = local.start(plan, seen.append)
    records = (federation.hub, *federation.sites.values())
    members = [p for r in records for p in (*processes.family(r), *guarded_by(r.pid))]
    assert len(members) > 10, "the blocks' processes should be among them"
    assert {state for states in seen for state, _ in states.values()} - {"ready"}, "no progress"
    yield federation
    with suppress(NotRunning):
        local.stop(plan.state_dir)
    _, alive = psutil.wait_procs(members, timeout=20)
    assert not alive, f"left behind: {alive}"


def stream(fabric: Fabric, prompt: str, **options: object) -> tuple[Completion, list[str]]:
    with fabric.stream(prompt, **options) as answer:  # type: ignore[arg-type]
        moves = [chunk.because for chunk in answer if chunk.because]
    return answer.result, moves


def test_one_life_of_a_federation(up: Federation, plan: local.Plan) -> None:
    state = plan.state_dir
    with Fabric(up.base_url, up.api_key, num_retries=0) as fabric:
        _both_sites_give_the_same_answer(fabric)
        _a_second_one_is_refused(plan, up)
        _instance_killed_comes_back(up, fabric)
        _hub_killed_loses_nothing(up, state)
        _site_killed_under_streams(state, fabric)
    local.stop(state)
    with Database(state.database_url) as database:
        Ledger(database).verify()


def _both_sites_give_the_same_answer(fabric: Fabric) -> None:
    alpha, beta = (
        fabric.complete(PROMPT, max_tokens=24, temperature=0, sites=[site])
        for site in ("alpha", "beta")
    )
    assert (alpha.site, beta.site) == ("alpha", "beta")
    assert alpha.digest == beta.digest
    assert alpha.text == beta.text
    assert alpha.charge_usu == beta.charge_usu > 0


def _a_second_one_is_refused(plan: local.Plan, up: Federation) -> None:
    with pytest.raises(AlreadyRunning, match=up.base_url):
        local.start(plan, lambda _: None)
    port = httpx.URL(up.base_url).port
    assert port is not None
    with pytest.raises(PortInUse, match=str(port)):
        local.choose_port("127.0.0.1", port)


def _instance_killed_comes_back(up: Federation, fabric: Fabric) -> None:
    (instance,) = [
        p for p in guarded_by(up.sites["beta"].pid) if "fabric.instance" in " ".join(p.cmdline())
    ]
    near_beta: Options = {"data_site": "beta", "data_bytes": 10**10}
    with fabric.stream(PROMPT, max_tokens=200, temperature=0, **near_beta) as answer:
        next(iter(answer))
        assert answer.site == "beta"
        instance.send_signal(signal.SIGKILL)
        text = "".join(chunk.text for chunk in answer)
    assert (answer.result.site, answer.result.attempts) == ("alpha", 2)
    assert len(text) > 100
    for _ in processes.poll(60):
        if all(site.state == "ready" for site in fabric.sites()):
            break
    again = fabric.complete(PROMPT, max_tokens=4, temperature=0, sites=["beta"])
    assert again.site == "beta"


def _hub_killed_loses_nothing(up: Federation, state: StateDir) -> None:
    with Fabric(up.base_url, up.api_key, num_retries=0) as fabric:
        answer = fabric.stream(PROMPT, max_tokens=300, temperature=0)
        next(iter(answer))
        with Database(state.database_url) as database:
            held = sum(a.held_usu for a in Ledger(database).allocations(local.PROJECT))
        assert held > 0
        os.kill(up.hub.pid, signal.SIGKILL)
        with pytest.raises(FabricError) as broken:
            list(answer)
        assert broken.value.code == StreamBroken.code
    local.restart_hub(state, up)
    with Fabric(up.base_url, up.api_key) as fabric:
        for _ in processes.poll(30):
            if all(site.state == "ready" for site in fabric.sites()):
                break
        assert fabric.complete(PROMPT, max_tokens=4, sites=["alpha"]).site == "alpha"
        for _ in processes.poll(20):
            with Database(state.database_url) as database:
                held = sum(a.held_usu for a in Ledger(database).allocations(local.PROJECT))
            if held == 0:
                break
        assert held == 0, "the lease is over and the hold is still there"


def _site_killed_under_streams(state: StateDir, fabric: Fabric) -> None:
    up = state.federation()
    assert up is not None
    expected = fabric.complete(PROMPT, max_tokens=120, temperature=0).text
    with ThreadPoolExecutor(8) as threads:
        started = [
            fabric.stream(PROMPT, max_tokens=120, temperature=0, data_site=site, data_bytes=10**11)
            for site in ("alpha", "beta", "alpha", "beta")
        ]
        for answer in started:
            next(iter(answer))
        assert [answer.site for answer in started] == ["alpha", "beta", "alpha", "beta"]
        processes.kill(up.sites["alpha"])
        later = [
            threads.submit(stream, fabric, PROMPT, max_tokens=120, temperature=0) for _ in range(4)
        ]
        moved = 0
        for answer in started:
            moved += sum(bool(chunk.because) for chunk in answer)
            assert answer.result.text == expected
            assert answer.result.site == "beta"
        for future in later:
            result, _ = future.result(timeout=120)
            assert result.text == expected
    assert moved == 2
    unseeded = fabric.stream(PROMPT, max_tokens=200, temperature=1.0)
    next(iter(unseeded))
    processes.kill(up.sites["beta"])
    with pytest.raises(StreamBroken, match="without a seed"):
        list(unseeded)
