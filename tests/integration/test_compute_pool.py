"""A compute pool on a Globus rig: the real SDK, the real agent, and what may go wrong between."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import suppress
from uuid import UUID, uuid4

import pytest
from globus_compute_sdk import Executor
from globus_sdk import ComputeAPIError

from fabric.compute import ComputePool, ComputeTarget, ServiceLimits
from fabric.compute.executor import end_result_watcher
from fabric.errors import PayloadTooLarge, ServiceRefused, TaskFailed, TaskTimedOut
from fabric.testing.compute import get_rig_pool
from fabric.testing.globus import Endpoint, Globus, PublishedLimits, running_globus

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SOURCE = """
def echo(value, sleep_s=0):
    import time

    time.sleep(sleep_s)
    return value


def fail(reason):
    raise ValueError(reason)


def fill(num_bytes):
    return "a" * num_bytes
"""
THREADS = {"engine": "threads", "workers": 4}
RESULT_S = 120.0
PUBLISHED = PublishedLimits(requests=12, window_s=2.0)
"""More at once than the published ones, so that tests wait less."""
LIMITS = ServiceLimits(max_requests=6, window_s=2.0)
"""The part of one pool: the endpoint's agent and the test before belong to the same identity."""
ALL = ServiceLimits(max_requests=12, window_s=2.0)


@pytest.fixture(scope="module")
def globus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Globus]:
    with running_globus(tmp_path_factory.mktemp("rig"), limits=PUBLISHED) as globus:
        yield globus


@pytest.fixture(scope="module")
def endpoint(globus: Globus) -> Iterator[Endpoint]:
    with globus.endpoint("pool", owner="hub") as endpoint:
        yield endpoint


@pytest.fixture
def pool(globus: Globus) -> Iterator[ComputePool]:
    with get_rig_pool(globus, "hub", LIMITS) as pool:
        yield pool


@pytest.fixture(scope="module")
def functions(globus: Globus) -> dict[str, UUID]:
    with get_rig_pool(globus, "hub", LIMITS) as pool:
        names = ("echo", "fail", "fill")
        return {name: UUID(pool.client.register_source_code(SOURCE, name)) for name in names}


@pytest.fixture
def target(endpoint: Endpoint) -> ComputeTarget:
    return ComputeTarget(endpoint_id=endpoint.id, config=THREADS)


def wait_until(condition: Callable[[], object], *, timeout_s: float = 20.0) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def results(futures: list[Future]) -> list[object]:
    return [future.result(RESULT_S) for future in futures]


def test_results_come_back_as_json(pool, target, functions) -> None:
    values = [None, True, 3, 0.5, "é", [1, [2]], {"a": {"b": []}}]
    assert results([pool.submit(target, functions["echo"], (value,)) for value in values]) == values


def test_remote_failures_are_typed(pool, target, functions) -> None:
    failed = pool.submit(target, functions["fail"], ("told so",))
    large = pool.submit(target, functions["fill"], (12_000_000,))
    slow = pool.submit(target, functions["echo"], (1, 4.0), timeout_s=2.0)
    with pytest.raises(TaskFailed, match="ValueError: told so"):
        failed.result(RESULT_S)
    with pytest.raises(PayloadTooLarge) as caught:
        large.result(RESULT_S)
    assert caught.value.detail["size_bytes"] > 12_000_000
    assert caught.value.detail["cap_bytes"] == pool.limits.result_bytes
    with pytest.raises(TaskTimedOut):
        slow.result(RESULT_S)
    wait_until(lambda: pool.num_stray_results == 1, timeout_s=60)


def test_options_against_the_schema_are_named(pool, endpoint, functions) -> None:
    target = ComputeTarget(endpoint_id=endpoint.id, config={"workers": 99})
    with pytest.raises(TaskFailed, match=r"\(ValidationError\) 99 is greater than"):
        pool.submit(target, functions["echo"], (1,)).result(RESULT_S)


def test_refused_task_fails_alone(pool, target, functions) -> None:
    unknown = UUID(int=7)
    futures = [pool.submit(target, functions["echo"], (number,)) for number in range(3)]
    refused = pool.submit(target, unknown, (1,))
    futures += [pool.submit(target, functions["echo"], (number,)) for number in range(3, 6)]
    assert results(futures) == list(range(6))
    with pytest.raises(ServiceRefused, match="FUNCTION_NOT_FOUND"):
        refused.result(RESULT_S)


def test_storm_of_requests_stays_within_the_limits(globus, target, functions) -> None:
    wait_until(lambda: time.time() - globus.requests()[-1].at > ALL.window_s)
    before = len(globus.violations())
    stop = threading.Event()

    def ask(pool: ComputePool) -> None:
        while not stop.is_set():
            pool.client.get_endpoint_status(target.endpoint_id)

    with get_rig_pool(globus, "hub", ALL) as pool:
        asking = threading.Thread(target=ask, args=(pool,))
        asking.start()
        try:
            for number in range(12):  # one by one, so that each is a submit of its own
                assert pool.submit(target, functions["echo"], (number,)).result(RESULT_S) == number
        finally:
            stop.set()
            asking.join()
        assert pool.budget.num_requests > 24
    wait_until(lambda: time.time() - globus.requests()[-1].at > ALL.window_s)
    assert globus.violations()[before:] == []


def test_429_only_delays(globus, target, functions) -> None:
    began_at = time.time()
    with (
        get_rig_pool(globus, "hub", ServiceLimits(max_requests=1000)) as greedy,
        get_rig_pool(globus, "hub", LIMITS) as pool,
    ):
        stop = threading.Event()

        def refused_submits() -> bool:
            return any(
                one.status == 429 and one.path.endswith("/submit")
                for one in globus.requests()
                if one.at >= began_at
            )

        def spend() -> None:
            # No longer than needed: the SDK's result thread gives up after five refusals.
            while not stop.is_set() and not refused_submits():
                with suppress(ComputeAPIError):
                    greedy.client.get_endpoint_status(target.endpoint_id)

        spending = threading.Thread(target=spend)
        spending.start()
        try:
            for number in range(6):
                assert pool.submit(target, functions["echo"], (number,)).result(RESULT_S) == number
        finally:
            stop.set()
            spending.join()
        assert refused_submits()


def test_payloads_of_one_submit_fit_one_request(globus, pool, target, functions) -> None:
    before = len(globus.violations())
    words = ["a" * 3_000_000 for _ in range(6)]
    futures = [pool.submit(target, functions["echo"], (word,)) for word in words]
    assert [len(str(result)) for result in results(futures)] == [3_000_000] * 6
    assert globus.violations()[before:] == []


def test_service_away_for_a_while_loses_nothing(globus, pool, target, functions) -> None:
    running = [pool.submit(target, functions["echo"], (number, 5.0)) for number in range(3)]
    other = ComputeTarget(endpoint_id=target.endpoint_id, config={**THREADS, "workers": 3})
    elsewhere = pool.submit(other, functions["echo"], ("other", 5.0))
    wait_until(lambda: all(future.running() for future in (*running, elsewhere)))
    wait([*running, elsewhere], 3.0)
    globus.stop_service()
    try:
        meanwhile = [pool.submit(target, functions["echo"], (number,)) for number in range(5)]
        assert not wait(meanwhile, 20.0).done, "there was a service after all"
    finally:
        globus.start_service()
    assert results(meanwhile) == list(range(5))
    assert results(running) == list(range(3))
    assert elsewhere.result(RESULT_S) == "other"


def test_endpoint_that_goes_offline_is_noticed(globus, pool, functions) -> None:
    with globus.endpoint("short-lived", owner="hub") as endpoint:
        assert pool.status(endpoint.id).online
        endpoint.kill_core()
        endpoint.wait_offline()
        wait_until(lambda: not pool.status(endpoint.id).online, timeout_s=20)


def test_unknown_endpoint_is_refused(pool) -> None:
    with pytest.raises(ServiceRefused, match="ENDPOINT_NOT_FOUND"):
        pool.status(UUID(int=3))


def test_executors_of_others_in_this_process_are_left_alone(globus, pool, target, functions):
    assert pool.submit(target, functions["echo"], (1,)).result(RESULT_S) == 1
    client = globus.client("hub")
    config = dict(target.config)
    with Executor(target.endpoint_id, client, uuid4(), user_endpoint_config=config) as other:
        # Its results come as the SDK writes them by default, which our client would not read.
        theirs = other.submit_to_registered_function(str(functions["echo"]), (2,))
        assert pool.submit(target, functions["echo"], (3,)).result(RESULT_S) == 3
        assert theirs.result(RESULT_S) == 2
        other.shutdown()
    end_result_watcher(other.task_group_id, 30)


def test_close_ends_all_threads_with_tasks_under_way(globus, target, functions) -> None:
    before = set(threading.enumerate())
    pool = get_rig_pool(globus, "hub", LIMITS)
    pool.start()
    assert pool.submit(target, functions["echo"], (1,)).result(RESULT_S) == 1
    running = pool.submit(target, functions["echo"], (1, 20.0))
    wait([running], 2.0)
    pool.close()
    assert running.exception(0).code == "task_lost"
    # The SDK's module keeps one thread that waits for the end of the process.
    wait_until(
        lambda: {t for t in threading.enumerate() if "atexit" not in t.name} <= before,
        timeout_s=30,
    )
