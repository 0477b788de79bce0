"""docs/raw-calls.md runs as written, by a user of a real endpoint agent who has no SDK of ours."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from fabric.broker import BrokerSettings
from fabric.compute.functions import register, shipped_function
from fabric.messages import InstanceSpec
from fabric.sdk import Fabric
from fabric.testing.commands import get_environ, read_blocks, run_blocks
from fabric.testing.globus import Endpoint, Globus
from fabric.testing.hub import MODEL, PROJECT, RunningHub, running_hub, wait_until
from fabric.testing.rig import get_spec

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PAGE = Path(__file__).parents[2] / "docs/raw-calls.md"
PATIENCE_S = 180.0
GRANT_USU = 10_000
USER = "alice"


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A site whose endpoint is alice's, with an instance that dialled the hub."""

    endpoint: Endpoint
    infer: UUID
    executor: Any

    def call(self, **batch: object) -> list[dict[str, Any]]:
        """Send one batch as any user of Globus Compute would, and return its results."""
        future: Future[dict[str, Any]] = self.executor.submit_to_registered_function(
            str(self.infer), args=({"model": MODEL, **batch},)
        )
        results: list[dict[str, Any]] = future.result(PATIENCE_S)["results"]
        return results


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHub]:
    settings = BrokerSettings(lease_s=30.0)
    directory = tmp_path_factory.mktemp("hub")
    with running_hub(directory, sites=(), grant_usu=GRANT_USU, broker=settings) as hub:
        hub.catalog.add_site("alpha")
        hub.catalog.add_site("beta")
        yield hub


@pytest.fixture(scope="module")
def fabric(hub: RunningHub) -> Iterator[Fabric]:
    with Fabric(hub.base_url, hub.api_key) as fabric:
        yield fabric


@pytest.fixture(scope="module")
def site(
    globus: Globus, hub: RunningHub, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    from globus_compute_sdk import Executor
    from globus_compute_sdk.serialize import ComputeSerializer, JSONData

    directory = tmp_path_factory.mktemp("home")
    centre = globus.client("site-a")
    start, stop, infer = (
        register(centre, shipped_function(name), public=True)
        for name in ("start_instance", "stop_instance", "infer")
    )
    environ = {"HOME": str(directory), "FABRIC_INSTANCE_MODULE": "fabric.testing.instance"}
    with (
        globus.endpoint(
            "raw", owner=USER, allowed_functions=[start, stop, infer], task_environ=environ
        ) as endpoint,
        Executor(
            endpoint.id,
            client=globus.client(USER),
            task_group_id=uuid4(),
            user_endpoint_config={"engine": "processes", "workers": 3},
        ) as executor,
    ):
        executor.serializer = ComputeSerializer(strategy_data=JSONData())
        spec = _spec(hub, directory)
        started = executor.submit_to_registered_function(
            str(start), args=(spec.model_dump(mode="json", exclude={"status_path"}),)
        )
        try:
            wait_until(lambda: bool(hub.broker.replicas()), timeout_s=PATIENCE_S)
            yield Site(endpoint=endpoint, infer=infer, executor=executor)
        finally:
            executor.submit_to_registered_function(str(stop), args=(spec.launch.instance,))
            assert started.result(PATIENCE_S)["exit_code"] == 0


def _spec(hub: RunningHub, directory: Path) -> InstanceSpec:
    record, token = hub.catalog.add_launch("alpha", MODEL)
    spec = get_spec(directory, session_url=hub.session_url, token=token)
    launch = spec.launch.model_copy(update={"instance": record.instance, "model": record.model})
    return spec.model_copy(update={"launch": launch, "guest_token": None})


def test_the_page_runs_as_written(
    globus: Globus, hub: RunningHub, site: Site, fabric: Fabric, tmp_path: Path
) -> None:
    whose = globus.environ(USER)
    places = {"ENDPOINT": str(site.endpoint.id), "INFER": str(site.infer), "MODEL": MODEL}
    environ = get_environ(tmp_path, hub, **whose, **places)
    outputs = run_blocks(read_blocks(PAGE), environ, tmp_path, PATIENCE_S)
    told = " ".join(f"word{position}" for position in range(20))
    assert outputs[1].splitlines() == [told, told]
    runs = fabric.runs()
    assert [(run.state, run.site, run.project) for run in runs] == [
        ("completed", "alpha", PROJECT)
    ] * 2
    assert all(run.id in outputs[2] for run in runs)
    # A word of a prompt costs 1 micro-SU, as a message does; a word of an answer 2.
    assert sorted(run.charge_usu for run in runs) == [4 + 2 * 20, 4 + 2 * 20]
    charged = [line.run for line in fabric.usage().lines if line.kind == "charge"]
    assert sorted(filter(None, charged)) == sorted(run.id for run in runs)


def test_a_ticket_that_does_not_pay_is_each_tasks_error(
    hub: RunningHub, site: Site, fabric: Fabric
) -> None:
    before = _spent(fabric)
    expired, revoked = fabric.ticket("alpha", ttl_s=0.05), fabric.ticket("alpha")
    fabric.revoke_ticket(revoked.id)
    good = fabric.ticket("alpha").ticket
    tasks: list[dict[str, object]] = [{"prompt": "x", "max_tokens": 2}] * 2
    for ticket, code in (
        (None, "missing_ticket"),
        ("fabt_000000000000_" + "a" * 43, "invalid_ticket"),
        (hub.api_key, "invalid_ticket"),
        (revoked.ticket, "invalid_ticket"),
        (expired.ticket, "expired_ticket"),
        (fabric.ticket("beta").ticket, "foreign_ticket"),
    ):
        results = site.call(ticket=ticket, tasks=tasks)
        assert [result["error"]["code"] for result in results] == [code, code]
        assert str(ticket) not in str(results)
    dear = {"prompt": "x " * GRANT_USU, "max_tokens": 2000, "n": 4}
    results = site.call(ticket=good, tasks=[dear, {"prompt": "x", "max_token": 1}, tasks[0]])
    assert [one["error"]["code"] for one in results[:2]] == [
        "insufficient_balance",
        "unknown_parameter",
    ]
    assert results[2]["text"] == "word0 word1"
    wait_until(lambda: _spent(fabric) == before + 5, timeout_s=PATIENCE_S)


def test_a_batch_sent_again_is_charged_once(site: Site, fabric: Fabric) -> None:
    before, ticket = _spent(fabric), fabric.ticket("alpha").ticket
    task = {
        "id": "run_of_my_own",
        "model": MODEL,
        "input": {"kind": "text", "text": "one two"},
        "sampling": {"max_tokens": 3},
    }
    first, second = (site.call(ticket=ticket, tasks=[task]) for _ in range(2))
    assert first[0]["usage"]["output_tokens"] == 3
    assert second[0]["error"]["code"] == "already_exists"
    wait_until(lambda: _spent(fabric) == before + 2 + 2 * 3, timeout_s=PATIENCE_S)


def _spent(fabric: Fabric) -> int:
    return -sum(line.amount_usu for line in fabric.usage().lines if line.kind == "charge")


def test_page_is_short() -> None:
    assert len(PAGE.read_text().split()) <= 350
