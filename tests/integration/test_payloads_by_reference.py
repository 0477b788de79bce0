"""Results over Globus Compute's limit come from a real endpoint's worker by reference."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest

from fabric.compute import ComputePool, ComputeTarget
from fabric.config import FileStore, StoreConfig, save_store
from fabric.dispatch.compute import ComputeRelay
from fabric.errors import TaskFailed
from fabric.launch.rundir import RunDir
from fabric.messages import Event, Finished, InstanceSpec, Request, Sampling, Task, TextInput
from fabric.payloads import PayloadStore, unpack
from fabric.testing.compute import get_rig_pool, register_shipped
from fabric.testing.globus import Globus
from fabric.testing.instance import MODULE
from fabric.testing.rig import get_spec
from fabric.testing.stores import running_endpoint, running_redis

pytestmark = pytest.mark.slow

MEGABYTES = 12
RESULT_S = 120.0
LARGE_RESULT = '''
def large_result(megabytes, run_dir):
    """Return an array of so many megabytes as an envelope."""
    from pathlib import Path

    import numpy
    from fabric.config import load_store
    from fabric.payloads import PayloadStore, pack

    value = {"activations": numpy.arange(megabytes * 125_000, dtype="f8")}
    config = load_store(Path(run_dir))
    if config is None:
        return pack(value, cap_bytes=5_000_000)
    with PayloadStore(config) as store:
        return pack(value, cap_bytes=5_000_000, store=store)
'''


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A real endpoint of the rig, and the hub's pool."""

    pool: ComputePool
    target: ComputeTarget

    def call(self, function_id: UUID, *args: Any) -> Any:
        return self.pool.submit(self.target, function_id, args).result(RESULT_S)


@pytest.fixture(scope="module")
def site(globus: Globus) -> Iterator[Site]:
    environ = {"FABRIC_INSTANCE_MODULE": MODULE}
    with (
        globus.endpoint("payloads", owner="hub", task_environ=environ) as endpoint,
        get_rig_pool(globus, "hub") as pool,
    ):
        config = {"engine": "threads", "workers": 3}
        yield Site(pool=pool, target=ComputeTarget(endpoint_id=endpoint.id, config=config))


@pytest.fixture(scope="module")
def large_result(site: Site) -> UUID:
    return UUID(site.pool.client.register_source_code(LARGE_RESULT, "large_result"))


@pytest.fixture(params=["file", "redis", "endpoint"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StoreConfig]:
    if request.param == "file":
        yield FileStore(kind="file", name="shared", directory=tmp_path / "payloads")
        return
    running = {"redis": running_redis, "endpoint": running_endpoint}[request.param]
    with running(tmp_path / "store") as config:
        yield config


def test_array_comes_by_reference_and_is_gone_once_read(
    site: Site, large_result: UUID, config: StoreConfig, tmp_path: Path
) -> None:
    save_store(config, tmp_path)
    envelope = site.call(large_result, MEGABYTES, str(tmp_path))
    assert envelope["$ref"]["size_bytes"] > MEGABYTES * 1_000_000
    with PayloadStore(config) as store:
        value = unpack(envelope, [store], evict=True)
    assert (value["activations"] == np.arange(MEGABYTES * 125_000)).all()
    if isinstance(config, FileStore):
        assert not list(config.directory.iterdir())


def test_without_a_store_the_cap_and_the_remedy_are_named(
    site: Site, large_result: UUID, tmp_path: Path
) -> None:
    with pytest.raises(TaskFailed, match="at most 5000000 are allowed here; configure a store"):
        site.call(large_result, MEGABYTES, str(tmp_path))


@contextmanager
def running_instance(site: Site, run_dir: Path) -> Iterator[InstanceSpec]:
    spec = get_spec(run_dir)
    instance = spec.launch.instance
    asked = spec.model_dump(mode="json", exclude={"status_path"})
    start_id = register_shipped(site.pool.client, "start_instance")
    ended = site.pool.submit(site.target, start_id, (asked, str(run_dir)))
    until = time.monotonic() + RESULT_S
    while (status := RunDir(str(run_dir)).read_status(instance)) is None or status.state != "ready":
        assert not ended.done(), ended.result()
        assert time.monotonic() < until, status
        time.sleep(0.05)
    try:
        yield spec
    finally:
        stop_id = register_shipped(site.pool.client, "stop_instance")
        assert site.call(stop_id, instance, str(run_dir))["stopped"]
        ended.result(RESULT_S)


async def test_twelve_megabytes_of_events_come_through_the_compute_channel(
    site: Site, tmp_path: Path
) -> None:
    config = FileStore(kind="file", name="shared", directory=tmp_path / "payloads")
    save_store(config, tmp_path)
    sampling = Sampling(max_tokens=1100, logprobs=20, ignore_eos=True)
    prompt = TextInput(text="a prompt")
    requests = [Request(model="fixed", input=prompt, sampling=sampling) for _ in range(10)]
    tasks = [
        Task(id=one.id, attempt=1, request=one, digest="", deadline_s=RESULT_S) for one in requests
    ]
    with PayloadStore(config) as store, running_instance(site, tmp_path) as spec:
        relay = ComputeRelay(
            site.pool,
            site.target,
            register_shipped(site.pool.client, "infer"),
            instance=spec.launch.instance,
            direct_token=spec.direct_token,
            run_dir=str(tmp_path),
            stores=[store],
        )
        answers = await relay.run(tasks)
    assert sum(map(count_bytes, answers)) > MEGABYTES * 1_000_000
    assert all(isinstance(events[-1], Finished) for events in answers)
    assert [len(events) for events in answers] == [1102] * len(tasks)
    assert not list(config.directory.iterdir()), "the hub was the last reader"


def count_bytes(events: list[Event]) -> int:
    return sum(len(event.model_dump_json(exclude_defaults=True)) for event in events)
