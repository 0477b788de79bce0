"""Requests at a hub whose only instance has gone, while another is on its way."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from fabric.broker import BrokerSettings
from fabric.errors import FabricError
from fabric.sdk import Completion, Fabric
from fabric.testing.engine import FixedDelayEngine
from fabric.testing.hub import MODEL, RunningHub, running_hub, wait_until

PATIENCE_S = 0.2
NUM_REQUESTS = 4


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[RunningHub]:
    """A hub that expects lost replicas back for a moment only, and has lost its only one."""
    settings = BrokerSettings(patience_s=PATIENCE_S, lost_memory_s=PATIENCE_S)
    with running_hub(tmp_path, sites=("alpha",), broker=settings) as hub:
        hub.kill_site("alpha")
        wait_until(lambda: not hub.broker.replicas(), timeout_s=30)
        yield hub


def expect(hub: RunningHub, ready_in_s: float) -> None:
    told = partial(
        hub.broker.arrivals.expect,
        "inst_coming",
        site="alpha",
        model=f"{MODEL}@1",
        ready_in_s=ready_in_s,
    )
    hub.loop.call_soon_threadsafe(told)


def ask(hub: RunningHub, *, deadline_s: float = 120) -> Completion:
    with Fabric(hub.base_url, hub.api_key, num_retries=0) as fabric:
        return fabric.complete("hi", model=MODEL, max_tokens=2, deadline_s=deadline_s)


def refusal(hub: RunningHub, *, deadline_s: float = 120) -> FabricError:
    with pytest.raises(FabricError) as caught:
        ask(hub, deadline_s=deadline_s)
    return caught.value


def test_requests_wait_for_the_instance_and_are_answered_by_it(hub: RunningHub) -> None:
    expect(hub, 60)
    asked_at = time.monotonic()
    with ThreadPoolExecutor(NUM_REQUESTS) as threads:
        asking = [threads.submit(ask, hub) for _ in range(NUM_REQUESTS)]
        # Longer than patience without it, and than lost replicas are remembered.
        wait_until(lambda: time.monotonic() > asked_at + 10 * PATIENCE_S, timeout_s=60)
        assert not any(one.done() for one in asking)
        site = hub.call(hub.start_site("alpha", FixedDelayEngine()))
        answers = [one.result(120) for one in asking]
    assert {one.text for one in answers} == {"word0 word1"}
    assert {(one.instance, one.attempts) for one in answers} == {(site.instance, 1)}


def test_without_one_a_request_is_refused_soon(hub: RunningHub) -> None:
    error = refusal(hub)
    assert error.code == "no_replica"
    assert error.detail["retry_after_s"] == 5


def test_one_that_comes_after_the_deadline_is_told(hub: RunningHub) -> None:
    expect(hub, 300)
    assert refusal(hub).code == "no_replica"  # the replica that was lost may just be remembered
    error = refusal(hub)
    assert "expected in" in error.message
    assert 240 < float(str(error.detail["retry_after_s"])) <= 300
