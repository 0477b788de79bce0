"""Jobs that fetch their weights from jobs which serve them: a real hub, real jobs and instances."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from functools import partial
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from fabric.config import SiteSpec
from fabric.errors import WeightsMissing
from fabric.launch.jobs import LaunchFolder, LaunchRecord, Order
from fabric.launch.jobs.replicas import ask_hub, find_replicas
from fabric.launch.jobs.stage import Stage
from fabric.messages import EngineOptions, InstanceSpec, InstanceState, Launch
from fabric.messages.weights import WeightsSource, make_ticket
from fabric.sdk import Fabric
from fabric.testing.hub import PROJECT, RunningHub, running_hub, wait_until
from fabric.testing.instance import MODULE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PATIENCE_S = 90.0
MODEL = "brought@1"
# So slow that whatever a replica sends is faster.
RATES = {"shared_read_gb_s": 1e-4, "local_read_gb_s": 4.0, "local_write_gb_s": 2.0}
NUM_BYTES = 40_000_000


class Job:
    """A job of a launch, which runs the instance that it was given a permission for."""

    def __init__(self, folder: LaunchFolder, process: subprocess.Popen[bytes], name: str) -> None:
        self.process, self.name = process, name
        self._folder = folder

    @property
    def log(self) -> str:
        return self._folder.instance_log(self.name).read_text()

    def wait_for(self, state: InstanceState) -> None:
        def is_there() -> bool:
            status = self._folder.status(self.name)
            return status is not None and status.state == state

        wait_until(is_there, timeout_s=PATIENCE_S)


class Machine:
    """A machine whose nodes are folders, and what its users do there."""

    def __init__(self, hub: RunningHub, root: Path, stack: ExitStack) -> None:
        self.hub, self.root, self.stack = hub, root, stack
        self.name = f"m-{secrets.token_hex(4)}"
        self.weights = root / "shared" / "m"
        self.weights.mkdir(parents=True)
        (self.weights / "config.json").write_text("{}")
        (self.weights / "model.safetensors").write_bytes(os.urandom(NUM_BYTES))
        self.owner = self.user(PROJECT)

    def user(self, project: str) -> Fabric:
        _, key = self.hub.keys.add_key(project, scopes=("query", "launch"))
        return self.stack.enter_context(Fabric(self.hub.base_url, key))

    def permit(self, user: Fabric, **changes: str) -> Launch:
        given = {"model": MODEL, "machine": self.name, "sharing": "project"} | changes
        told = user.add_instance(lifetime_s=3600.0, **given)
        return Launch.model_validate(told)

    def site(self, node: str) -> SiteSpec:
        (self.root / node).mkdir(exist_ok=True)
        facts: Mapping[str, Any] = {
            "center": "Here",
            "scheduler": "local",
            "network": {"interface": "lo"},
            "storage": RATES | {"local_dir": str(self.root / node)},
            "sources": ["a test"],
            "checked": "2026-11",
        }
        return SiteSpec.model_validate({"name": "here", "system": facts})

    def order(self, **changes: object) -> Order:
        asked = {"model": MODEL, "machine": "here", "walltime": "00:30:00"}
        return Order.model_validate(asked | changes)

    def start(self, launch: Launch, node: str, *, source: Path | None = None) -> Job:
        """Start a job on a node, which copies its weights there."""
        folder = LaunchFolder.create(self.root / "launches")
        folder.write_launch(
            LaunchRecord(
                name=folder.name,
                order=self.order(staging="always"),
                site=self.site(node),
                queue=None,
                hub_url=self.hub.base_url,
                created_at=datetime.now(UTC),
            )
        )
        if source is not None:
            launch = launch.model_copy(update={"source": str(source)})
        spec = InstanceSpec(
            launch=launch,
            session_url=self.hub.session_url,
            direct_token="d" * 32,
            status_path=str(folder.status_path(launch.instance)),
        )
        command = [
            *(sys.executable, "-m", "fabric.launch.jobs.inblock", str(folder.write_spec(spec))),
            *(str(folder.instance_log(launch.instance)), "--walltime-s", "1800"),
            *("--warning-s", "10", "--module", MODULE),
        ]
        environ = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "PBS"))}
        process = self.stack.enter_context(subprocess.Popen(command, env=environ))
        self.stack.callback(process.kill)
        return Job(folder, process, launch.instance)

    def sources(self, launch: Launch) -> tuple[WeightsSource, ...]:
        return ask_hub(self.hub.base_url, launch.token)

    def give(self, node: str) -> Job:
        """Start a job that serves and gives what it has copied."""
        job = self.start(self.permit(self.owner), node, source=self.weights)
        asker = self.permit(self.owner)
        wait_until(
            lambda: job.name in {one.instance for one in self.sources(asker)},
            timeout_s=PATIENCE_S,
        )
        return job

    def stage(self, launch: Launch, node: str) -> tuple[Stage, list[str], list[str]]:
        """Return what brings the weights of a job in this process, and what it says and tells."""
        said: list[str] = []
        told: list[str] = []
        system = self.site(node).system
        assert system is not None
        stage = Stage(
            order=self.order(),
            options=EngineOptions(backend="vllm"),  # it reads twice
            system=system,
            host=node,
            ranks=(1,),
            manifests=self.root / f"manifests-{node}",
            run_on=lambda _index, _command: pytest.fail("there is one node"),
            say=said.append,
            tell=told.append,
            find_replicas=partial(find_replicas, self.hub.base_url, launch.token, said.append),
        )
        return stage, said, told

    def copied(self, copy: str) -> bool:
        files = ("config.json", "model.safetensors")
        return all(
            (Path(copy) / name).read_bytes() == (self.weights / name).read_bytes() for name in files
        )


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHub]:
    with running_hub(tmp_path_factory.mktemp("hub"), sites=()) as hub:
        hub.keys.add_project("others")
        for name in ("brought", "other"):
            hub.catalog.add_model(name, "1", source="/no/such/m", context_tokens=2048)
        yield hub


@pytest.fixture
def machine(hub: RunningHub, tmp_path: Path) -> Iterator[Machine]:
    with ExitStack() as stack:
        yield Machine(hub, tmp_path, stack)


def get(url: str, path: str, **headers: str) -> tuple[int, bytes]:
    to = urlsplit(url)
    connection = HTTPConnection(str(to.hostname), to.port, timeout=PATIENCE_S)
    connection.request("GET", path, headers=headers)
    reply: HTTPResponse = connection.getresponse()
    with reply:
        return reply.status, reply.read()


def test_a_job_without_weights_has_them_from_a_replica(machine: Machine) -> None:
    giver = machine.give("n1")
    taker = machine.start(machine.permit(machine.owner), "n2")
    taker.wait_for(InstanceState.READY)
    assert "from a replica: they are nowhere else" in taker.log
    assert f"0.04 GB from {giver.name}" in taker.log
    (copy,) = (path for path in (machine.root / "n2").glob("*/versions/[!.]*") if path.is_dir())
    assert machine.copied(str(copy))


def test_a_copy_goes_on_at_another_replica_when_one_is_killed(machine: Machine) -> None:
    givers = {job.name: job for job in (machine.give("n1"), machine.give("n2"))}
    stage, said, told = machine.stage(launch := machine.permit(machine.owner), "n3")
    killed: list[str] = []

    def tell(detail: str) -> None:
        told.append(detail)
        # Its first chunk of the large file has arrived.
        if not killed and len(told) == 2:
            killed.append(detail.split()[3].rstrip(":"))
            job = givers[killed[0]]
            job.process.kill()
            job.process.wait(PATIENCE_S)

    object.__setattr__(stage, "tell", tell)
    copy = stage.bring(launch)
    assert machine.copied(copy)
    (other,) = set(givers) - set(killed)
    assert told[0].startswith(f"copying weights from {killed[0]}: ")
    assert told[-1] == f"copying weights from {other}: 0.04 of 0.04 GB"
    (lost,) = (line for line in said if "no more from" in line)
    assert lost.startswith(f"weights: no more from {killed[0]}: it ended at ")
    assert said[-1].startswith(f"weights: in {copy}, ")
    assert all(name in said[-1] for name in givers)


def test_what_is_not_what_its_digest_says_is_refused(machine: Machine) -> None:
    giver = machine.give("n1")
    (lie,) = (machine.root / "n1").glob("*/versions/[!.]*/model.safetensors")
    with lie.open("r+b") as file:
        file.seek(NUM_BYTES // 2)
        byte = file.read(1)
        file.seek(NUM_BYTES // 2)
        file.write(bytes([byte[0] ^ 1]))

    missing = machine.permit(machine.owner)
    stage, said, _ = machine.stage(missing, "n2")
    away = machine.weights.rename(machine.root / "away")
    with pytest.raises(WeightsMissing):
        stage.bring(missing)
    lied = f"no more from {giver.name}: what it sent of model.safetensors is not sha256:"
    assert any(lied in line for line in said)
    away.rename(machine.weights)

    here = machine.permit(machine.owner).model_copy(update={"source": str(machine.weights)})
    stage, said, told = machine.stage(here, "n3")
    assert machine.copied(copy := stage.bring(here))
    assert copy != here.source
    assert any(lied in line for line in said)
    assert told[-1] == "copying weights: 0.04 of 0.04 GB"


def test_files_are_given_by_range_to_launches_of_the_owners_alone(machine: Machine) -> None:
    giver = machine.give("n1")
    asker = machine.permit(machine.owner)
    (source,) = machine.sources(asker)
    assert source.instance == giver.name
    bearer = {"Authorization": f"Bearer {source.ticket}"}
    status, manifest = get(source.url, "/manifest", **bearer)
    assert status == 200
    stage, _, _ = machine.stage(asker, "n2")
    replicas = stage.find_replicas()
    assert replicas is not None
    assert replicas.manifest is not None
    assert replicas.manifest.model_dump_json().encode() == manifest
    digest = {file.path: file.sha256 for file in replicas.manifest.files}["model.safetensors"]
    whole = (machine.weights / "model.safetensors").read_bytes()
    at = NUM_BYTES - 5
    assert get(source.url, f"/{digest}", **bearer) == (206, whole)
    assert get(source.url, f"/{digest}", Range=f"bytes={at}-", **bearer) == (206, whole[at:])
    for range_ in ("bytes=-5", f"bytes={NUM_BYTES + 1}-", "bytes=0-1,3-4", "x"):
        assert get(source.url, f"/{digest}", Range=range_, **bearer)[0] == 416

    instance, expires, signature = source.ticket.split(".")
    later = float(expires) + 1e6
    for ticket in (
        "",
        "..",
        "é",
        f"{instance}.{later:.0f}.{signature}",
        make_ticket("0" * 64, instance, later),
    ):
        refused = {"Authorization": f"Bearer {ticket}".encode()}
        assert get(source.url, "/manifest", **refused)[0] == 404  # type: ignore[arg-type]
    assert get(source.url, f"/{digest}")[0] == 404
    for path in ("/", "/../../etc/passwd", f"/{'0' * 64}", "/config.json"):
        assert get(source.url, path, **bearer)[0] == 404

    stranger, colleague = machine.user("others"), machine.user(PROJECT)
    assert machine.sources(machine.permit(colleague)) != ()
    assert machine.sources(machine.permit(stranger)) == ()
    assert machine.sources(machine.permit(machine.owner, model="other@1")) == ()
    assert machine.sources(machine.permit(machine.owner, machine="elsewhere")) == ()
    giver.process.kill()
    wait_until(lambda: machine.sources(asker) == (), timeout_s=PATIENCE_S)
