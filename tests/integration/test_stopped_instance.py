"""An instance whose process is stopped: up, connected, and silent."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from fabric.sdk import Fabric
from fabric.testing.engine import FixedDelayEngine
from fabric.testing.hub import MODEL, PROJECT, RunningHub, running_hub, wait_until
from fabric.testing.rig import InstanceProcess, get_spec, start_instance

PATIENCE_S = 60.0


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[RunningHub]:
    with running_hub(
        tmp_path, sites=["alpha"], engine=lambda: FixedDelayEngine(token_s=0.005)
    ) as hub:
        yield hub


@pytest.fixture
def beta(hub: RunningHub, tmp_path: Path) -> Iterator[InstanceProcess]:
    """An instance in a process of its own, at a site of its own."""
    hub.catalog.add_site("beta")
    launch, token = hub.catalog.add_launch("beta", MODEL)
    spec = get_spec(
        tmp_path,
        engine="token_s=0.05",
        session_url=hub.session_url,
        site="beta",
        model=launch.model,
        token=token,
    )
    named = spec.launch.model_copy(update={"instance": launch.instance})
    with start_instance(spec.model_copy(update={"launch": named})) as instance:
        wait_until(lambda: is_there(hub), timeout_s=PATIENCE_S)
        yield instance


def is_there(hub: RunningHub) -> bool:
    return any(one.site == "beta" and one.state == "ready" for one in hub.broker.replicas())


@pytest.mark.slow
def test_a_stopped_instance_is_left_and_comes_back(hub: RunningHub, beta: InstanceProcess) -> None:
    with Fabric(hub.base_url, hub.api_key) as fabric:
        expected = fabric.complete("x", max_tokens=150, temperature=0, sites=["alpha"]).text
        answer = fabric.stream(
            "x", max_tokens=150, temperature=0, data_site="beta", data_bytes=10**11
        )
        chunks = iter(answer)
        seen = [next(chunks) for _ in range(3)]
        assert answer.site == "beta"
        beta.process.send_signal(signal.SIGSTOP)
        try:
            assert fabric.complete("x", max_tokens=2, sites=["alpha"]).site == "alpha"
            seen += chunks
            assert not is_there(hub)
        finally:
            beta.process.send_signal(signal.SIGCONT)
        assert "".join(chunk.text for chunk in seen) == expected
        assert (answer.result.site, answer.result.attempts) == ("alpha", 2)
        wait_until(lambda: is_there(hub), timeout_s=PATIENCE_S)
        assert fabric.complete("x", max_tokens=2, sites=["beta"]).site == "beta"
        wait_until(lambda: hub.ledger.allocations(PROJECT)[0].held_usu == 0, timeout_s=PATIENCE_S)
        # A prompt token costs 1 micro-SU, an answer's 2, whoever said it and however often.
        charged = {line.run: -line.amount_usu for line in fabric.usage().lines if line.run}
        assert charged[answer.result.run_id] == 1 + 2 * 150
        assert len(charged) == 4
    hub.ledger.verify()
