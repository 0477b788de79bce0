"""Real endpoint agents and the real SDK on the rig: what works, and what happens when parts die."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import pytest
from globus_compute_sdk import Client, Executor
from globus_compute_sdk.errors import TaskExecutionFailed
from globus_compute_sdk.serialize import JSONData, PureSourceTextInspect
from globus_sdk import GlobusAPIError

from fabric.testing.globus import Endpoint, Globus
from fabric.testing.hub import wait_until
from fabric.testing.processes import wait_ended

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

RESULT_S = 150.0
THREADS = {"engine": "threads"}


def describe(number: int) -> dict[str, int]:
    import os

    return {"double": 2 * number, "pid": os.getpid(), "parent": os.getppid()}


def end_worker() -> None:
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)


def wait_for_file(started: str, go: str) -> str:
    import time
    from pathlib import Path

    Path(started).touch()
    until = time.monotonic() + 120
    while not Path(go).exists() and time.monotonic() < until:
        time.sleep(0.05)
    Path(started).with_suffix(".ended").touch()
    return started


def large(num_bytes: int) -> str:
    return "x" * num_bytes


@pytest.fixture(scope="module")
def client(globus: Globus) -> Client:
    return globus.client(
        "site-a",
        code_serialization_strategy=PureSourceTextInspect(),
        data_serialization_strategy=JSONData(),
    )


@pytest.fixture(scope="module")
def endpoint(globus: Globus) -> Iterator[Endpoint]:
    with globus.endpoint("alpha") as running:
        yield running
    assert not running.processes(), "left behind"


@contextmanager
def executing(client: Client, endpoint: Endpoint, **config: Any) -> Iterator[Executor]:
    # The executors of one process share a task group otherwise, and with it its owner.
    options = {"client": client, "user_endpoint_config": config}
    executor = Executor(endpoint.id, task_group_id=uuid4(), **options)
    # A task per request, without the SDK's wait after four: the service allows more.
    executor.api_burst_limit = 100
    try:
        yield executor
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


class Held:
    """Tasks that have begun and end only when told to."""

    def __init__(self, executor: Executor, function: str, folder: Path, num: int) -> None:
        self.go = folder / "go"
        self.started = [folder / f"task-{index}" for index in range(num)]
        self.futures: list[Future[str]] = [
            executor.submit_to_registered_function(function, (str(one), str(self.go)))
            for one in self.started
        ]
        wait_until(lambda: all(one.exists() for one in self.started), timeout_s=RESULT_S)

    def end(self) -> None:
        self.go.touch()
        ended = [one.with_suffix(".ended") for one in self.started]
        wait_until(lambda: all(one.exists() for one in ended), timeout_s=RESULT_S)

    def results(self) -> list[str]:
        return [future.result(RESULT_S) for future in self.futures]


@pytest.fixture(scope="module")
def functions(client: Client) -> dict[Callable[..., Any], str]:
    return {
        one: client.register_function(one) for one in (describe, end_worker, wait_for_file, large)
    }


Functions = dict[Callable[..., Any], str]


def test_a_registered_function_runs_on_a_worker(
    client: Client, endpoint: Endpoint, functions: Functions
) -> None:
    with executing(client, endpoint) as executor:
        futures = [
            executor.submit_to_registered_function(functions[describe], (number,))
            for number in range(5)
        ]
        results = [future.result(RESULT_S) for future in futures]
    assert [one["double"] for one in results] == [0, 2, 4, 6, 8]
    assert {one["pid"] for one in results} <= {one.pid for one in endpoint.processes()}


def test_a_killed_worker_fails_its_task_and_no_other(
    client: Client, endpoint: Endpoint, functions: Functions
) -> None:
    with executing(client, endpoint) as executor:
        killed = executor.submit_to_registered_function(functions[end_worker])
        with pytest.raises(TaskExecutionFailed, match="WorkerLost"):
            killed.result(RESULT_S)
        again = executor.submit_to_registered_function(functions[describe], (1,))
        assert again.result(RESULT_S)["double"] == 2


def test_a_killed_user_endpoint_leaves_no_orphans_and_comes_back(
    client: Client, endpoint: Endpoint, functions: Functions, tmp_path: Path
) -> None:
    # What it ran is lost, or runs again where it was not acknowledged yet: with two workers.
    with executing(client, endpoint, workers=2) as executor:
        Held(executor, functions[wait_for_file], tmp_path, 1)
        killed = endpoint.user_endpoint_pids()
        orphans = endpoint.kill_user_endpoints()
        assert len(orphans) > 3, "an interchange, a pool of workers and a worker at least"
        assert not wait_ended(orphans, timeout_s=30)
        again = executor.submit_to_registered_function(functions[describe], (2,))
        assert again.result(RESULT_S)["double"] == 4
        assert not set(killed) & set(endpoint.user_endpoint_pids())


def test_a_killed_core_endpoint_comes_back(
    client: Client, endpoint: Endpoint, functions: Functions
) -> None:
    with executing(client, endpoint) as executor:
        executor.submit_to_registered_function(functions[describe], (1,)).result(RESULT_S)
        endpoint.kill_core()
        wait_until(lambda: not endpoint.user_endpoint_pids(), timeout_s=60)
        endpoint.wait_offline()
        assert client.get_endpoint_status(endpoint.id)["status"] == "offline"
        endpoint.start_core()
        assert client.get_endpoint_status(endpoint.id)["status"] == "online"
        again = executor.submit_to_registered_function(functions[describe], (3,))
        assert again.result(RESULT_S)["double"] == 6


def test_results_wait_for_a_service_that_is_down(
    globus: Globus, client: Client, endpoint: Endpoint, functions: Functions, tmp_path: Path
) -> None:
    with executing(client, endpoint, **THREADS) as executor:
        held = Held(executor, functions[wait_for_file], tmp_path, 2)
        globus.stop_service()
        try:
            held.end()
        finally:
            globus.start_service()
        assert held.results() == [str(one) for one in held.started]


def test_results_come_over_a_broker_that_was_restarted(
    globus: Globus, client: Client, endpoint: Endpoint, functions: Functions, tmp_path: Path
) -> None:
    with executing(client, endpoint, **THREADS) as executor:
        held = Held(executor, functions[wait_for_file], tmp_path, 2)
        globus.restart_broker()
        held.end()
        assert held.results() == [str(one) for one in held.started]
        again = executor.submit_to_registered_function(functions[describe], (4,))
        assert again.result(RESULT_S)["double"] == 8


def test_a_stopped_endpoint_is_offline_at_once_and_takes_its_tasks_later(
    client: Client, endpoint: Endpoint, functions: Functions
) -> None:
    endpoint.stop_core()
    assert client.get_endpoint_status(endpoint.id)["status"] == "offline"
    with executing(client, endpoint, **THREADS) as executor:
        waiting = executor.submit_to_registered_function(functions[describe], (5,))
        wait_until(lambda: waiting.task_id is not None, timeout_s=RESULT_S)  # type: ignore[attr-defined]
        endpoint.start_core()
        assert waiting.result(RESULT_S)["double"] == 10


def test_a_result_above_the_limit_fails_its_task(
    client: Client, endpoint: Endpoint, functions: Functions
) -> None:
    with executing(client, endpoint, **THREADS) as executor:
        future = executor.submit_to_registered_function(functions[large], (12 * 10**6,))
        with pytest.raises(TaskExecutionFailed, match="MaxResultSizeExceeded"):
            future.result(RESULT_S)


def test_an_unknown_option_is_named_in_the_tasks_error(
    client: Client, endpoint: Endpoint, functions: Functions
) -> None:
    with executing(client, endpoint, colour="red") as executor:
        future = executor.submit_to_registered_function(functions[describe], (1,))
        with pytest.raises(TaskExecutionFailed, match="colour"):
            future.result(RESULT_S)


def test_a_strangers_task_does_not_run(
    globus: Globus, endpoint: Endpoint, functions: Functions
) -> None:
    client = globus.client("bob", code_serialization_strategy=PureSourceTextInspect())
    function = client.register_function(describe)
    with executing(client, endpoint, **THREADS) as executor:
        future = executor.submit_to_registered_function(function, (1,))
        with pytest.raises((TaskExecutionFailed, GlobusAPIError)) as refused:
            future.result(RESULT_S)
    # An agent with the rights of root serves many users in principle, and refuses by itself.
    reason = "untrusted identity" if os.geteuid() == 0 else "ENDPOINT_ACCESS_FORBIDDEN"
    assert reason in str(refused.value)


ORPHANED = """
import sys, time
from pathlib import Path
from globus_compute_sdk import Executor
from fabric.testing.globus import running_globus

with running_globus(Path(sys.argv[1])) as globus, globus.endpoint("orphan") as endpoint:
    with Executor(endpoint.id, client=globus.client("site-a")) as executor:
        executor.submit(abs, -1).result(120)
        print("ready", flush=True)
        time.sleep(600)
"""


def test_everything_ends_with_a_process_that_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ORPHANED, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as rig:
        assert rig.stdout is not None
        assert rig.stdout.readline() == "ready\n"
        family = psutil.Process(rig.pid).children(recursive=True)
        names = " ".join(word for one in family for word in one.cmdline())
        assert all(name in names for name in ("epmd", "beam", "service", "HTEX interchange"))
        rig.kill()
    assert not wait_ended(family, timeout_s=120)


def test_only_permitted_functions_run(globus: Globus, client: Client, functions: Functions) -> None:
    permitted, other = functions[describe], functions[large]
    with globus.endpoint("closed", allowed_functions=[permitted]) as closed:
        listed = client.get_allowed_functions(closed.id)
        assert (listed["restricted"], listed["functions"]) == (True, [permitted])
        with executing(client, closed, **THREADS) as executor:
            future = executor.submit_to_registered_function(permitted, (1,))
            assert future.result(RESULT_S)["double"] == 2
        with executing(client, closed, **THREADS) as executor:
            refused = executor.submit_to_registered_function(other, (1,))
            with pytest.raises(GlobusAPIError, match="FUNCTION_NOT_PERMITTED") as error:
                refused.result(RESULT_S)
        assert error.value.http_status == 403
    assert not closed.processes(), "left behind"
