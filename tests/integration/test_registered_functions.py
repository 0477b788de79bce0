"""The registered functions through a real endpoint agent, and the commands that register them."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psutil
import pytest
from globus_compute_sdk import Client, Executor
from globus_compute_sdk.errors import TaskExecutionFailed

from fabric.compute import RequestBudget, ServiceLimits
from fabric.compute.client import RESULT_SERIALIZERS
from fabric.compute.functions import (
    FunctionSource,
    check_source,
    fetch_source,
    register,
    retire,
    shipped_function,
    shipped_functions,
)
from fabric.errors import FunctionDrifted, NotFound, RequestInvalid, ServiceRefused
from fabric.messages import InstanceSpec
from fabric.testing.compute import TASK_ENVIRON, get_rig_client
from fabric.testing.globus import Globus, PublishedLimits, running_globus
from fabric.testing.processes import wait_ended
from fabric.testing.rig import get_spec

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PATIENCE_S = 120.0
OWNER = "hub"
MANY = 10_000


@pytest.fixture(scope="module")
def globus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Globus]:
    """A rig of this module's own, whose service lets one identity ask as often as it likes."""
    limits = PublishedLimits(requests=MANY)
    with running_globus(tmp_path_factory.mktemp("rig"), limits=limits) as globus:
        yield globus


@pytest.fixture(scope="module")
def client(globus: Globus) -> Client:
    return get_client(globus, OWNER)


def get_client(globus: Globus, user: str) -> Client:
    return get_rig_client(globus, user, RequestBudget(ServiceLimits(max_requests=MANY)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """An endpoint that runs the shipped functions and nothing else."""

    executor: Executor
    ids: dict[str, UUID]
    run_dir: str

    def submit(self, name: str, *arguments: object) -> Future[Any]:
        extra = () if name == "estimate_wait" else (self.run_dir,)
        return self.executor.submit_to_registered_function(
            str(self.ids[name]), (*arguments, *extra)
        )

    def call(self, name: str, *arguments: object) -> Any:
        return self.submit(name, *arguments).result(PATIENCE_S)

    def wait_ready(self, instance: str) -> dict[str, Any]:
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            for one in self.call("describe_site")["instances"]:
                if one["instance"] == instance and one["state"] == "ready":
                    return dict(one)
        raise TimeoutError(f"{instance} is not ready")


@pytest.fixture(scope="module")
def site(
    globus: Globus, client: Client, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    ids = {name: register(client, source) for name, source in shipped_functions().items()}
    with (
        globus.endpoint(
            "functions", owner=OWNER, allowed_functions=ids.values(), task_environ=TASK_ENVIRON
        ) as endpoint,
        Executor(
            endpoint.id,
            client=client,
            task_group_id=uuid4(),
            user_endpoint_config={"workers": 3},
            result_serializers=list(RESULT_SERIALIZERS),
            api_burst_limit=100,
        ) as executor,
    ):
        run_dir = str(tmp_path_factory.mktemp("site") / "run")
        yield Site(executor=executor, ids=ids, run_dir=run_dir)


@pytest.fixture
def spec(tmp_path: Path) -> InstanceSpec:
    return get_spec(tmp_path, model="fixed@1")


def to_json(spec: InstanceSpec) -> dict[str, Any]:
    return spec.model_dump(mode="json", exclude={"status_path"})


def get_task(digest: str, id: str = "run_1", mode: str = "query") -> dict[str, Any]:
    request = {
        "id": id,
        "mode": mode,
        "model": "fixed@1",
        "input": {"kind": "text", "text": "hi"},
        "sampling": {"max_tokens": 2},
    }
    task = {"id": id, "attempt": 1, "request": request, "digest": digest, "deadline_s": 60}
    return {"type": "task", **task}


# ---- on a worker of an endpoint --------------------------------------------------------------


def test_every_function_does_its_part_at_an_endpoint(site: Site, spec: InstanceSpec) -> None:
    assert site.call("estimate_wait", "local", {})["wait_s"] == {"p50": 0.0, "p90": 0.0}
    assert site.call("describe_site")["instances"] == []

    instance = spec.launch.instance
    ended = site.submit("start_instance", to_json(spec))
    described = site.wait_ready(instance)
    digest = described["hello"]["digest"]

    hub = {"instance": instance, "token": spec.direct_token}
    tasks = [get_task(digest, "run_1"), get_task(digest, "run_2")]
    answer = site.call("infer", {**hub, "describe": True, "tasks": tasks})
    assert answer["heartbeat"]["state"] == "ready"
    texts = ["".join(event.get("text", "") for event in events) for events in answer["events"]]
    assert texts == ["word0 word1", "word0 word1"]

    program = {**hub, "task": get_task(digest, "run_3", mode="program")}
    ((refused,),) = site.call("run_program", program)["events"]
    assert refused["failure"]["code"] == "protocol_violation"

    raw = site.call("infer", {"model": "fixed", "tasks": [{"prompt": "x"}]})
    assert raw["results"][0]["error"]["code"] == "missing_ticket"

    assert site.call("stop_instance", instance)["stopped"] is True
    result = ended.result(PATIENCE_S)
    assert (result["exit_code"], result["detail"]) == (0, "drained")
    assert site.call("describe_site")["instances"] == []


def test_a_version_is_brought_to_the_site(site: Site, tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(os.urandom(100_000))
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    file = {
        "path": "model.safetensors",
        "size_bytes": 100_000,
        "sha256": sha256,
        "source": str(weights),
    }
    manifest = {
        "name": "toy",
        "revision": "1",
        "digest": f"sha256:{sha256}",
        "files": [file],
    }
    first = site.call("replicate_version", manifest)
    assert (first["num_files"], first["fetched_bytes"]) == (1, 100_000)
    copy = Path(first["path"]) / "model.safetensors"
    assert copy.read_bytes() == weights.read_bytes()
    assert copy.is_relative_to(site.run_dir)
    assert site.call("replicate_version", manifest)["fetched_bytes"] == 0


def test_an_instance_ends_with_the_worker_that_started_it(site: Site, spec: InstanceSpec) -> None:
    ended = site.submit("start_instance", to_json(spec))
    described = site.wait_ready(spec.launch.instance)
    instance = psutil.Process(described["pid"])
    worker = instance.parent()
    assert worker is not None
    worker.kill()
    assert wait_ended([instance], timeout_s=30) == []
    with pytest.raises(TaskExecutionFailed):
        ended.result(PATIENCE_S)
    assert site.call("describe_site")["instances"] == []
    with pytest.raises(TaskExecutionFailed, match="was started at this site before"):
        site.call("start_instance", to_json(spec))


def test_a_wrong_argument_is_told_by_its_sentence(site: Site) -> None:
    with pytest.raises(TaskExecutionFailed, match=r"'options.partition' cannot be 'x; id'"):
        site.call("estimate_wait", "slurm", {"partition": "x; id"})
    with pytest.raises(TaskExecutionFailed, match=r"'spec.launch' cannot be"):
        site.call("start_instance", {})


def test_what_the_endpoint_does_not_allow_is_not_run(
    globus: Globus, client: Client, site: Site
) -> None:
    other = register(client, FunctionSource(name="f", source="def f():\n    return 1\n"))
    with pytest.raises(Exception, match="FUNCTION_NOT_PERMITTED"):
        client.run(endpoint_id=site.executor.endpoint_id, function_id=str(other))


# ---- registration ----------------------------------------------------------------------------


def test_what_is_registered_is_what_ships(client: Client, site: Site) -> None:
    for name, shipped in shipped_functions().items():
        registered = fetch_source(client, site.ids[name])
        assert (registered.name, registered.sha256) == (name, shipped.sha256)
        assert registered.description == shipped.description


def test_a_changed_function_is_named(client: Client) -> None:
    shipped = shipped_function("infer")
    changed = FunctionSource(name="infer", source=shipped.source + "    # changed\n")
    function_id = register(client, changed)
    registered = fetch_source(client, function_id)
    with pytest.raises(FunctionDrifted, match=changed.sha256):
        check_source(shipped, function_id, registered.sha256)


def test_who_may_call_is_as_registered(globus: Globus, client: Client) -> None:
    shipped = shipped_function("describe_site")
    alice, bob = get_client(globus, "alice"), get_client(globus, "bob")
    shared = register(client, shipped, group=UUID(globus.group_id))
    assert fetch_source(alice, shared).sha256 == shipped.sha256
    with pytest.raises((NotFound, ServiceRefused)):
        fetch_source(bob, shared)
    public = register(client, shipped, public=True)
    assert fetch_source(bob, public).sha256 == shipped.sha256
    with pytest.raises(RequestInvalid, match="public, a group's, or one endpoint's"):
        register(client, shipped, public=True, endpoint_id=uuid4())


def test_a_retired_function_is_gone(globus: Globus, client: Client) -> None:
    function_id = register(client, shipped_function("infer"), public=True)
    with pytest.raises(ServiceRefused):
        retire(get_client(globus, "bob"), function_id)
    retire(client, function_id)
    retire(client, function_id)
    with pytest.raises(NotFound, match=str(function_id)):
        fetch_source(client, function_id)


# ---- the commands ----------------------------------------------------------------------------


class Admin:
    """Runs ``fabric-admin function`` as the hub's operator, in processes of its own."""

    def __init__(self, globus: Globus, directory: Path) -> None:
        self.database = directory / "hub.db"
        self._environ = {
            **os.environ,
            **globus.environ(OWNER),
            "FABRIC_STATE_DIR": str(directory / "state"),
        }

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "fabric.cli.admin", "function", *arguments]
        return subprocess.run(
            [*command, "--database", f"sqlite:///{self.database}"],
            env=self._environ,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )

    def json(self, *arguments: str) -> Any:
        done = self.run(*arguments, "--format", "json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture
def admin(globus: Globus, tmp_path: Path) -> Admin:
    return Admin(globus, tmp_path)


def test_commands_register_list_show_and_retire(admin: Admin, client: Client) -> None:
    planned = admin.json("register", "--dry-run")
    assert {one["name"]: one["sha256"] for one in planned} == {
        name: shipped.sha256 for name, shipped in shipped_functions().items()
    }
    assert all(one["id"] is None for one in planned)
    assert admin.json("list") == [], "a dry run registers nothing"

    registered = admin.json("register", "--public")
    assert {one["name"] for one in registered} == set(shipped_functions())
    assert {one["state"] for one in registered} == {"current"}
    by_name = {one["name"]: one for one in registered}
    infer = by_name["infer"]["id"]
    assert fetch_source(client, UUID(infer)).sha256 == by_name["infer"]["sha256"]

    again = admin.json("register", "--public", "infer")
    assert [one["id"] for one in again] == [infer], "what has not changed keeps its id"
    private = admin.json("register", "infer")
    assert private[0]["id"] != infer, "who may call it is another"
    forced = admin.json("register", "--public", "infer", "--force")
    assert forced[0]["id"] not in (infer, private[0]["id"])

    shown = admin.json("show", infer)
    assert shown["source"].strip() == shipped_function("infer").source.strip()
    several = admin.run("show", "infer")
    assert several.returncode == 3
    assert "several times" in several.stderr

    retired = admin.json("retire", infer, "-y")
    assert retired["state"] == "retired"
    with pytest.raises(NotFound):
        fetch_source(client, UUID(infer))
    assert infer not in {one["id"] for one in admin.json("list")}
    assert infer in {one["id"] for one in admin.json("list", "--all")}


def test_commands_name_what_has_drifted(admin: Admin, client: Client) -> None:
    from fabric.catalog import Catalog
    from fabric.sql import Database

    (infer,) = admin.json("register", "infer")
    old = FunctionSource(name="infer", source='def infer(batch, run_dir="~/.fabric"): ...\n')
    old_id = str(register(client, old))
    with Database(f"sqlite:///{admin.database}") as database:
        catalog = Catalog(database)
        catalog.retire_function(infer["id"])
        catalog.add_function(old_id, "infer", sha256=old.sha256, fabric_version="0.0.1")
    listed = admin.run("list")
    assert listed.returncode == 0
    assert "drifted" in listed.stdout
    for part in (old.sha256, shipped_function("infer").sha256, old_id):
        assert part in listed.stderr
    assert "fabric-admin function register infer" in listed.stderr
    shown = admin.run("show", "infer", "--format", "json")
    assert shown.returncode == 3
    assert json.loads(shown.stderr)["error"]["code"] == "function_drifted"
    (mended,) = admin.json("register", "infer")
    assert mended["state"] == "current"


def test_commands_say_what_is_wrong(admin: Admin) -> None:
    unknown = admin.run("register", "infre")
    assert unknown.returncode == 3
    assert "describe_site, estimate_wait, infer" in unknown.stderr
    assert admin.run("register", "--public", "--endpoint", str(uuid4())).returncode == 2
    assert admin.run("register", "--group", "not-a-uuid").returncode == 2
    assert admin.run("show", "nothing").returncode == 3
    admin.json("register", "infer")
    kept = admin.run("retire", "infer")
    assert kept.returncode == 3
    assert "Nothing was changed" in kept.stderr
    assert len(admin.json("list")) == 1


def test_a_service_that_is_away_is_named_and_nothing_is_recorded(
    admin: Admin, globus: Globus
) -> None:
    globus.stop_service()
    try:
        away = admin.run("register", "infer")
    finally:
        globus.start_service()
    assert away.returncode == 5, away.stderr
    assert "does not answer" in away.stderr
    assert admin.json("list") == []
