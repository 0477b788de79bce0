"""What an agent makes of what a site behind an endpoint says of its instances."""

from concurrent.futures import Future
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from fabric.launch import compute
from fabric.launch.compute import ComputeLaunched
from fabric.launch.starter import why_ended
from fabric.testing.rig import get_spec

ENDPOINT = UUID(int=1)


@pytest.fixture
def started() -> Future[Any]:
    return Future()


@pytest.fixture
def launched(tmp_path: Path, started: Future[Any]) -> ComputeLaunched:
    return ComputeLaunched(get_spec(tmp_path), ENDPOINT, started, stop=lambda: None)


def describe(launched: ComputeLaunched, state: str = "ready") -> dict[str, Any]:
    instance = launched.spec.launch.instance
    return {"instances": [{"instance": instance, "state": state, "pid": 7, "host": "node-1"}]}


def test_a_description_says_how_far_an_instance_is(launched: ComputeLaunched) -> None:
    launched.take(describe(launched, "loading"))
    assert not launched.ready
    launched.take(describe(launched))
    assert launched.ready


@pytest.mark.parametrize(
    "nonsense", [None, "ready", [], {}, {"instances": None}, {"instances": "all"}]
)
def test_what_is_no_description_ends_nothing(launched: ComputeLaunched, nonsense: object) -> None:
    launched.take(describe(launched))
    for _ in range(3 * compute.MISSES):
        launched.take(nonsense)
    assert launched.ready
    assert not launched.ended.done()


def test_an_instance_that_is_gone_from_its_site_has_ended(launched: ComputeLaunched) -> None:
    launched.take(describe(launched))
    for _ in range(compute.MISSES):
        launched.take({"instances": [3, {"instance": "another"}]})
    assert "gone with its worker" in why_ended(launched)


def test_an_instance_that_waits_for_a_worker_has_not_ended(launched: ComputeLaunched) -> None:
    for _ in range(3 * compute.MISSES):
        launched.take({"instances": []})
    assert not launched.ended.done()


def test_an_instance_that_no_worker_begins_is_given_up(
    launched: ComputeLaunched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compute, "STARTS_S", -1.0)
    for _ in range(compute.MISSES):
        launched.take({"instances": []})
    assert "never started" in why_ended(launched)


def test_the_functions_result_is_the_instances_end(
    launched: ComputeLaunched, started: Future[Any]
) -> None:
    started.set_result({"exit_code": 1, "detail": "the model has no weights"})
    assert launched.ended.result() == 1
    assert why_ended(launched) == "the model has no weights"
    assert not launched.stop()


def test_a_lost_task_is_a_lost_worker(launched: ComputeLaunched, started: Future[Any]) -> None:
    started.set_exception(ConnectionError("WorkerLost"))
    assert "WorkerLost" in why_ended(launched)
