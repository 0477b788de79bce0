"""Raw calls end to end: a real hub, a real instance process, and guests on plain WebSockets."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from fabric.auth import Keys
from fabric.broker import BrokerSettings
from fabric.catalog import Catalog
from fabric.ledger import Ledger
from fabric.messages import (
    Cancel,
    Drain,
    InstanceState,
    Request,
    Sampling,
    Task,
    TextInput,
    Welcome,
)
from fabric.sdk import Fabric
from fabric.sql import Database, migrate
from fabric.testing.hub import MODEL, PROJECT, RunningHub, wait_until
from fabric.testing.raw_calls import running_two_site_hub
from fabric.testing.rig import InstanceProcess, get_spec, start_instance

pytestmark = pytest.mark.timeout(180)

PATIENCE_S = 60.0
GRANT_USU = 100_000
SLOW = "token_s=0.02"
Event = dict[str, Any]


class Guest:
    """A user's program at the site: no part of the SDK."""

    def __init__(self, websocket: ClientConnection) -> None:
        self.websocket = websocket
        self.lines: list[str] = []
        self.ends: dict[str, Event] = {}
        self.hello = self.receive()
        self.send(Welcome(session="guest", heartbeat_s=3600.0).model_dump_json())

    def send(self, line: str) -> None:
        self.websocket.send(line)

    def receive(self) -> Event:
        while not self.lines:
            self.lines = str(self.websocket.recv(timeout=PATIENCE_S)).split("\n")
        frame: Event = json.loads(self.lines.pop(0))
        return frame

    def next_of(self, *types: str) -> Event:
        while (frame := self.receive())["type"] not in types:
            pass
        return frame

    def run(self, *tasks: Task) -> list[Event]:
        """Send tasks and return how each ended."""
        for task in tasks:
            self.send(task.model_dump_json())
        return [self.end_of(task) for task in tasks]

    def end_of(self, task: Task) -> Event:
        """Return the last event of a task, which may have come before."""
        while task.id not in self.ends:
            frame = self.next_of("finished", "failed")
            self.ends[frame["task_id"]] = frame
        return self.ends.pop(task.id)


@contextmanager
def visiting(instance: InstanceProcess, token: str | None = None) -> Iterator[Guest]:
    status = instance.wait_for(InstanceState.READY, timeout_s=PATIENCE_S)
    assert status.direct_url is not None
    assert status.guest_token is not None
    assert status.model == f"{MODEL}@1"
    headers = {"Authorization": f"Bearer {token or status.guest_token}"}
    with connect(status.direct_url, additional_headers=headers, proxy=None) as websocket:
        yield Guest(websocket)


def make_task(ticket: str | None, *, max_tokens: int = 10, **changes: object) -> Task:
    request = Request(
        model=MODEL,
        input=TextInput(text="one two three"),
        sampling=Sampling(max_tokens=max_tokens, ignore_eos=True),
    )
    task = Task(
        id=request.id,
        attempt=1,
        request=request,
        digest="sha256:" + "0" * 64,
        deadline_s=60.0,
        window=100_000,
        ticket=ticket,
    )
    return task.model_copy(update=changes)


def code(event: Event) -> str | None:
    return event["failure"]["code"] if event["type"] == "failed" else None


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[RunningHub]:
    settings = BrokerSettings(lease_s=3.0, sweep_s=0.2)
    with running_two_site_hub(tmp_path, settings, grant_usu=GRANT_USU) as hub:
        yield hub


Start = Callable[..., InstanceProcess]


@pytest.fixture
def start(hub: RunningHub, tmp_path: Path) -> Iterator[Start]:
    """Starts an instance at alpha that dials the hub, and returns it once it is a replica."""
    with started(tmp_path, hub.catalog, hub.session_url) as at_hub:

        def joined(engine: str = "") -> InstanceProcess:
            instance = at_hub(engine)
            name = instance.spec.launch.instance
            wait_until(
                lambda: name in {replica.instance for replica in hub.broker.replicas()},
                timeout_s=PATIENCE_S,
            )
            return instance

        yield joined


@contextmanager
def started(directory: Path, catalog: Catalog, session_url: str | None) -> Iterator[Start]:
    running = []

    def start(engine: str = "") -> InstanceProcess:
        record, token = catalog.add_launch("alpha", MODEL)
        spec = get_spec(directory, engine=engine, session_url=session_url, token=token)
        launch = spec.launch.model_copy(update={"instance": record.instance, "model": record.model})
        context = start_instance(spec.model_copy(update={"launch": launch}))
        running.append(context)
        return context.__enter__()

    try:
        yield start
    finally:
        for context in running:
            context.__exit__(None, None, None)


@pytest.fixture
def fabric(hub: RunningHub) -> Iterator[Fabric]:
    with Fabric(hub.base_url, hub.api_key) as fabric:
        yield fabric


def ticket_of(fabric: Fabric, site: str = "alpha", **options: Any) -> str:
    ticket = fabric.ticket(site, **options).ticket
    assert ticket is not None
    return ticket


def balance(ledger: Ledger) -> tuple[int, int]:
    """Return what is available and what is held, of books that add up."""
    ledger.verify()
    (one,) = ledger.allocations(PROJECT)
    return one.available_usu, one.held_usu


def spent(fabric: Fabric) -> dict[str, int]:
    """Return the charges of the project's statement by run."""
    charges: dict[str, int] = defaultdict(int)
    for line in fabric.usage().lines:
        if line.kind == "charge" and line.run is not None:
            charges[line.run] -= line.amount_usu
    return dict(charges)


def settled(fabric: Fabric, runs: Sequence[str]) -> dict[str, int]:
    wait_until(lambda: set(runs) <= spent(fabric).keys(), timeout_s=PATIENCE_S)
    return spent(fabric)


def test_a_call_is_answered_and_charged_on_the_projects_statement(hub, start, fabric) -> None:
    task = make_task(ticket_of(fabric))
    with visiting(start()) as guest:
        assert (guest.hello["type"], guest.hello["site"]) == ("hello", "alpha")
        guest.send(task.model_dump_json())
        guest.next_of("accepted")
        texts = [guest.next_of("token")["text"] for _ in range(10)]
        usage = guest.next_of("finished")["usage"]
    assert "".join(texts).startswith("word0 word1")
    assert (usage["prompt_tokens"], usage["output_tokens"]) == (3, 10)
    assert settled(fabric, [task.id]) == {task.id: 3 + 2 * 10}
    assert balance(hub.ledger) == (GRANT_USU - 23, 0)
    run = fabric.run(task.id)
    assert (run.state, run.site, run.charge_usu, run.attempts) == ("completed", "alpha", 23, 1)
    assert "raw call" in str(run.reason)
    assert run.first_token_s is not None


def test_each_task_is_refused_by_what_its_ticket_lacks(hub, start, fabric) -> None:
    expired, revoked = fabric.ticket("alpha", ttl_s=0.05), fabric.ticket("alpha")
    fabric.revoke_ticket(revoked.id)
    wait_until(lambda: not fabric.tickets(), timeout_s=PATIENCE_S)
    good = ticket_of(fabric)
    cases: dict[str, Task] = {
        "missing_ticket": make_task(None),
        "invalid_ticket": make_task(good[:-1] + ("a" if good[-1] != "a" else "b")),
        "expired_ticket": make_task(expired.ticket),
        "foreign_ticket": make_task(ticket_of(fabric, "beta")),
        "spent_ticket": make_task(ticket_of(fabric, max_usu=10)),
        "insufficient_balance": make_task(good, max_tokens=GRANT_USU),
        "digest_mismatch": make_task(good, digest="sha256:" + "1" * 64),
        "invalid_parameter": make_task(good, id="run_of_another_name"),
    }
    more = [make_task(revoked.ticket), make_task(hub.api_key), make_task(good, prefix=(1,))]
    answered = make_task(good)
    engine = "context_tokens=1000000"
    hub.catalog.modify_model(f"{MODEL}@1", context_tokens=1_000_000)
    with visiting(start(engine)) as guest:
        ends = guest.run(*cases.values(), *more, answered)
    assert [code(end) for end in ends[: len(cases)]] == list(cases)
    assert [code(end) for end in ends[len(cases) : -1]] == [
        "invalid_ticket",
        "invalid_ticket",
        "invalid_parameter",
    ]
    assert all(end["failure"]["message"].endswith(".") for end in ends[:-1])
    assert ends[-1]["type"] == "finished"
    assert settled(fabric, [answered.id]) == {answered.id: 23}
    assert balance(hub.ledger) == (GRANT_USU - 23, 0)


def test_a_killed_guest_is_charged_for_what_was_computed(hub, start, fabric) -> None:
    task = make_task(ticket_of(fabric), max_tokens=1500)
    with visiting(start(SLOW)) as guest:
        guest.send(task.model_dump_json())
        for _ in range(5):
            guest.next_of("token")
        assert balance(hub.ledger)[1] > 0
        guest.websocket.socket.shutdown(socket.SHUT_RDWR)
    charge_usu = settled(fabric, [task.id])[task.id]
    assert 3 + 2 * 5 <= charge_usu < 3 + 2 * 1000
    run = fabric.run(task.id)
    assert (run.state, run.charge_usu) == ("cancelled", charge_usu)
    assert charge_usu == 3 + 2 * run.usage.output_tokens
    assert balance(hub.ledger) == (GRANT_USU - charge_usu, 0)


def test_the_same_task_twice_runs_and_is_charged_once(hub, start, fabric) -> None:
    """Globus Compute may deliver a batch again, before its first end or after it."""
    task = make_task(ticket_of(fabric), max_tokens=50)
    instance = start(SLOW)
    with visiting(instance) as guest, visiting(instance) as second:
        guest.send(task.model_dump_json())
        guest.next_of("token")
        assert [code(end) for end in second.run(task)] == ["already_exists"]
        assert guest.end_of(task)["type"] == "finished"
        charges = settled(fabric, [task.id])
        assert [code(end) for end in second.run(task)] == ["already_exists"]
    assert charges == spent(fabric) == {task.id: 3 + 2 * 50}
    assert balance(hub.ledger) == (GRANT_USU - 103, 0)


def test_a_guest_that_cancels_is_charged_and_harms_nobody(hub, start, fabric) -> None:
    ticket = ticket_of(fabric)
    mine, other = (make_task(ticket, max_tokens=150) for _ in range(2))
    instance = start(SLOW)
    with visiting(instance) as guest, visiting(instance) as neighbour:
        neighbour.send(other.model_dump_json())
        neighbour.next_of("token")
        guest.send(mine.model_dump_json())
        guest.next_of("token")
        for task in (other, mine):
            guest.send(Cancel(task_id=task.id, attempt=1).model_dump_json())
        assert code(guest.end_of(mine)) == "request_cancelled"
        assert neighbour.end_of(other)["type"] == "finished"
    charges = settled(fabric, [mine.id, other.id])
    assert charges[mine.id] < charges[other.id] == 3 + 2 * 150


def test_a_guest_may_neither_drain_nor_pass_for_the_hub(hub, start, fabric) -> None:
    instance = start()
    with pytest.raises(InvalidStatus), visiting(instance, "wrong"):
        pass
    for frame in (Drain(reason="mine now").model_dump_json(), '{"type":"settled"}', "{"):
        with visiting(instance) as guest:
            guest.send(frame)
            with pytest.raises(ConnectionClosed):
                guest.next_of("goodbye")
            assert guest.websocket.close_code == 1002
    with visiting(instance, instance.spec.direct_token) as client:
        assert client.run(make_task(None))[0]["type"] == "finished"
    assert spent(fabric) == {}
    assert instance.wait_for(InstanceState.READY).state == InstanceState.READY


def test_an_instance_without_a_hub_runs_no_raw_call(hub, tmp_path, fabric) -> None:
    with started(tmp_path, hub.catalog, None) as start, visiting(start()) as guest:
        (end,) = guest.run(make_task(ticket_of(fabric)))
    assert code(end) == "hub_not_connected"
    assert "session" in end["failure"]["message"]


def test_a_draining_instance_settles_before_it_leaves(hub, start, fabric) -> None:
    task = make_task(ticket_of(fabric), max_tokens=100)
    instance = start(SLOW)
    with visiting(instance) as guest:
        guest.send(task.model_dump_json())
        guest.next_of("token")
        instance.process.send_signal(signal.SIGTERM)
        assert guest.end_of(task)["type"] == "finished"
        assert guest.next_of("goodbye")
        assert instance.process.wait(PATIENCE_S) == 0
    assert spent(fabric) == {task.id: 3 + 2 * 100}


def test_a_killed_instance_costs_nothing(hub, start, fabric) -> None:
    task = make_task(ticket_of(fabric), max_tokens=1000)
    instance = start(SLOW)
    with visiting(instance) as guest:
        guest.send(task.model_dump_json())
        guest.next_of("token")
        instance.process.kill()
        with pytest.raises(ConnectionClosed):
            guest.end_of(task)
    wait_until(lambda: balance(hub.ledger) == (GRANT_USU, 0), timeout_s=PATIENCE_S)
    run = fabric.run(task.id)
    assert (run.state, run.error_code, run.charge_usu) == ("failed", "session_lost", 0)


# ---- a hub that is killed ------------------------------------------------------------------------


class HubProcess:
    """`fabric-admin hub`, which may be killed and started again on its port and database."""

    def __init__(self, directory: Path, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._command = [
            *(sys.executable, "-m", "fabric.cli.admin", "hub", "--port", str(port)),
            *("--state-dir", str(directory / "state")),
            *("--database", f"sqlite:///{directory / 'hub.sqlite'}"),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        environ = os.environ | {"FABRIC_HUB_LEASE_S": "120"}
        self._process = subprocess.Popen(self._command, env=environ)
        wait_until(self._answers, timeout_s=PATIENCE_S)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/healthz").is_success
        except httpx.TransportError:
            return False


def test_a_call_outlives_a_hub_and_is_charged_by_the_next(tmp_path: Path, free_port: int) -> None:
    hub = HubProcess(tmp_path, free_port)
    session_url = f"ws{hub.url.removeprefix('http')}/v1/fabric/session"
    with Database(f"sqlite:///{tmp_path / 'hub.sqlite'}") as database:
        migrate(database)
        keys, catalog, ledger = Keys(database), Catalog(database), Ledger(database)
        keys.add_project(PROJECT)
        _, key = keys.add_key(PROJECT)
        catalog.add_model(MODEL, "1", context_tokens=2048, source="fixed-delay:")
        catalog.add_site("alpha")
        ledger.set_rate("*", "*", prompt_usu=1, cached_prompt_usu=1, output_usu=2)
        ledger.grant(ledger.open_allocation(PROJECT, "*"), GRANT_USU)
        try:
            hub.start()
            with (
                Fabric(hub.url, key) as fabric,
                started(tmp_path, catalog, session_url) as start,
                visiting(start(SLOW)) as guest,
            ):
                wait_until(lambda: fabric.sites()[0].state == "ready", timeout_s=PATIENCE_S)
                ticket = ticket_of(fabric)
                task = make_task(ticket, max_tokens=150)
                guest.send(task.model_dump_json())
                guest.next_of("token")
                hub.kill()
                assert [code(end) for end in guest.run(make_task(ticket))] == ["hub_not_connected"]
                assert guest.end_of(task)["type"] == "finished"
                assert balance(ledger)[1] > 0
                hub.start()
                assert settled(fabric, [task.id]) == {task.id: 3 + 2 * 150}
                assert balance(ledger) == (GRANT_USU - 303, 0)
                wait_until(lambda: fabric.sites()[0].state == "ready", timeout_s=PATIENCE_S)
                again = make_task(ticket)
                assert guest.run(again)[0]["type"] == "finished"
                assert settled(fabric, [again.id])[again.id] == 23
        finally:
            hub.kill()
