"""Who may open a session, and what becomes of peers that break its rules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from fabric.catalog import Catalog
from fabric.gateway import GatewaySettings
from fabric.messages import Hello, InstanceState, Limits
from fabric.messages.session import MAX_FRAME_BYTES, PROTOCOL
from fabric.sql import Database
from fabric.testing.fixed_programs import get_manifest
from fabric.testing.hub import MODEL, RunningHub, running_hub, wait_until

DIGEST = "sha256:" + "0" * 64
LIMITS = Limits(context_tokens=64, max_rows=1, cache_tokens=64)


@contextmanager
def dialled(hub: RunningHub, token: str | None) -> Iterator[ClientConnection]:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    with connect(hub.session_url, additional_headers=headers, max_size=None) as socket:
        yield socket


def hello(instance: object, **changes: object) -> str:
    said = Hello(
        instance=str(instance),
        site="alpha",
        model=f"{MODEL}@1",
        digest=DIGEST,
        limits=LIMITS,
        dtype="float32",
        engine="test",
    )
    return said.model_copy(update=changes).model_dump_json()


def closing(socket: ClientConnection) -> tuple[int | None, str | None]:
    """Return how the hub closes, whatever it says before."""
    with suppress(ConnectionClosed):
        while True:
            socket.recv(timeout=10)
    return socket.close_code, socket.close_reason


@pytest.fixture(autouse=True)
def _unharmed(hub: RunningHub, client: httpx.Client) -> Iterator[None]:
    """Whatever a peer did, the hub answers and its pool is as before."""
    yield
    reply = client.post("/v1/completions", json={"model": MODEL, "prompt": "x", "max_tokens": 1})
    assert reply.status_code == 200
    instances = {site.instance for site in hub.sites.values()}
    wait_until(lambda: {view.instance for view in hub.broker.replicas()} == instances)


def test_a_launched_instance_joins_and_leaves(hub: RunningHub, client: httpx.Client) -> None:
    launch, token = hub.catalog.add_launch("alpha", MODEL)
    with dialled(hub, token) as socket:
        socket.send(hello(launch.instance))
        assert '"welcome"' in str(socket.recv(timeout=10))
        wait_until(lambda: launch.instance in {v.instance for v in hub.broker.replicas()})
        wait_until(lambda: hub.catalog.launch(launch.instance).state is InstanceState.READY)
    wait_until(lambda: hub.catalog.launch(launch.instance).state is InstanceState.LOST)


def test_the_same_instance_may_dial_again(hub: RunningHub) -> None:
    launch, token = hub.catalog.add_launch("alpha", MODEL)
    with dialled(hub, token) as former, dialled(hub, token) as newer:
        former.send(hello(launch.instance))
        former.recv(timeout=10)
        newer.send(hello(launch.instance))
        assert closing(former) == (1000, "the instance dialled again")
        assert '"welcome"' in str(newer.recv(timeout=10))
        assert launch.instance in {view.instance for view in hub.broker.replicas()}


@pytest.mark.parametrize("token", [None, "", "wrong", "fabl_" + "a" * 43])
def test_without_a_launch_token_the_session_is_closed_with_4401(
    hub: RunningHub, token: str | None
) -> None:
    with dialled(hub, token) as socket:
        assert closing(socket) == (4401, "invalid_api_key")


def test_the_key_of_a_user_opens_no_session(hub: RunningHub) -> None:
    with dialled(hub, hub.api_key) as socket:
        assert closing(socket)[0] == 4401


def test_an_ended_launch_opens_no_session(hub: RunningHub) -> None:
    launch, token = hub.catalog.add_launch("alpha", MODEL)
    hub.catalog.end_launch(launch.instance, "no longer needed")
    with dialled(hub, token) as socket:
        assert closing(socket)[0] == 4401


def test_an_expired_launch_token_opens_no_session(hub: RunningHub) -> None:
    _, token = hub.catalog.add_launch("alpha", MODEL, lifetime_s=-1)
    with dialled(hub, token) as socket:
        assert closing(socket) == (4401, "expired_api_key")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"instance": "inst_other"}, "the instance"),
        ({"site": "beta"}, "the site alpha, not beta"),
        ({"model": "other@1"}, f"the model {MODEL}@1"),
        ({"digest": "sha256:" + "1" * 64}, "has the digest"),
        ({"points": get_manifest(MODEL, "sha256:" + "1" * 64, 64)}, "points are of another model"),
    ],
)
def test_an_instance_that_is_not_what_was_launched_is_closed_with_4409(
    hub: RunningHub, changes: dict[str, object], said: str
) -> None:
    launch, token = hub.catalog.add_launch("alpha", MODEL)
    with dialled(hub, token) as socket:
        socket.send(hello(**{"instance": launch.instance} | changes))
        code, reason = closing(socket)
    assert code == 4409
    assert said in str(reason)
    assert hub.catalog.launch(launch.instance).state is InstanceState.PENDING


@pytest.mark.parametrize(
    "first",
    ["", "garbage", "{}", "[1]", b"\x00\x01", '{"type": "heartbeat"}', '{"type": "hello"}'],
)
def test_what_is_not_a_hello_ends_the_session(hub: RunningHub, first: str | bytes) -> None:
    _, token = hub.catalog.add_launch("alpha", MODEL)
    with dialled(hub, token) as socket:
        socket.send(first)
        assert closing(socket)[0] == 1002


def test_another_protocol_version_is_refused(hub: RunningHub) -> None:
    launch, token = hub.catalog.add_launch("alpha", MODEL)
    with dialled(hub, token) as socket:
        socket.send(hello(launch.instance, protocol=PROTOCOL + 1))
        code, reason = closing(socket)
    assert code == 1002
    assert "follow the session protocol" in str(reason)


@pytest.mark.parametrize("when", ["before hello", "after welcome"])
def test_a_giant_frame_ends_the_session(hub: RunningHub, when: str) -> None:
    launch, token = hub.catalog.add_launch("alpha", MODEL)
    with dialled(hub, token) as socket:
        if when == "after welcome":
            socket.send(hello(launch.instance))
            socket.recv(timeout=10)
        with suppress(ConnectionClosed):
            socket.send(b"x" * (MAX_FRAME_BYTES + 1))
        # The reason is lost where it meets what the peer still sends.
        assert closing(socket)[0] in (1009, 1006)


@pytest.mark.parametrize("frame", ["garbage", "second hello", "token of nobody's task"])
def test_a_joined_peer_that_breaks_the_protocol_loses_only_its_session(
    hub: RunningHub, frame: str
) -> None:
    launch, token = hub.catalog.add_launch("alpha", MODEL)
    token_frame = '{"type":"token","task_id":"run_0","attempt":1,"choice":0,"position":0,'
    token_frame += '"token_id":1,"text":"forged"}'
    frames = {
        "garbage": "{not json",
        "second hello": hello(launch.instance),
        "token of nobody's task": token_frame,
    }
    with dialled(hub, token) as socket:
        socket.send(hello(launch.instance))
        socket.recv(timeout=10)
        socket.send(frames[frame])
        if frame == "token of nobody's task":
            socket.close()
            return
        assert closing(socket)[0] == 1002


def test_a_peer_that_vanishes_before_its_hello_is_forgotten(hub: RunningHub) -> None:
    _, token = hub.catalog.add_launch("alpha", MODEL)
    with dialled(hub, token) as socket:
        socket.close()


# ---- site agents ---------------------------------------------------------------------------------


@pytest.fixture
def agent(hub: RunningHub) -> Iterator[httpx.Client]:
    soon = datetime.now(UTC) + timedelta(minutes=5)
    _, key = hub.keys.add_key("physics", scopes=["site"], site="alpha", expires_at=soon)
    with httpx.Client(
        base_url=hub.base_url, headers={"authorization": f"Bearer {key}"}, timeout=10
    ) as agent:
        yield agent


def test_an_agent_launches_at_its_own_site_and_ends_what_it_launched(
    hub: RunningHub, agent: httpx.Client
) -> None:
    launch = agent.post("/v1/fabric/launches", json={"site": "alpha", "model": MODEL}).json()
    assert (launch["site"], launch["model"], launch["digest"]) == ("alpha", "fixed@1", DIGEST)
    assert launch["source"] == "fixed-delay:"
    with dialled(hub, launch["token"]) as socket:
        socket.send(hello(launch["instance"]))
        socket.recv(timeout=10)
        reply = agent.post(
            f"/v1/fabric/launches/{launch['instance']}/end", json={"reason": "walltime"}
        )
        assert reply.status_code == 204
        assert closing(socket) == (1000, "its launch was ended")
    record = hub.catalog.launch(launch["instance"])
    assert (record.state, record.ended_reason) == (InstanceState.STOPPED, "walltime")


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/fabric/launches", {"site": "beta", "model": MODEL}, 403),
        ("/v1/fabric/launches", {"site": "alpha", "model": "nope"}, 404),
        ("/v1/fabric/launches", {"site": "alpha"}, 400),
        ("/v1/fabric/launches", {"site": "alpha", "model": MODEL, "token": "mine"}, 400),
        ("/v1/fabric/sites/beta/status", {"state": "loading"}, 403),
        ("/v1/fabric/sites/alpha/status", {"state": "splendid"}, 400),
        ("/v1/fabric/launches/inst_0/end", {"reason": "x"}, 404),
    ],
)
def test_an_agent_is_refused_what_is_not_its_own(
    agent: httpx.Client, path: str, body: dict[str, str], status: int
) -> None:
    assert agent.post(path, json=body).status_code == status


def test_another_sites_launch_is_not_found(hub: RunningHub, agent: httpx.Client) -> None:
    instance = hub.sites["beta"].instance
    reply = agent.post(f"/v1/fabric/launches/{instance}/end", json={"reason": "malice"})
    assert reply.status_code == 404
    assert hub.catalog.launch(instance).state is InstanceState.READY


def test_an_agents_report_shows_while_nothing_is_ready(
    hub: RunningHub, agent: httpx.Client, client: httpx.Client
) -> None:
    hub.catalog.add_site("gamma")
    _, key = hub.keys.add_key("physics", scopes=["site"], site="gamma")

    def gamma() -> tuple[str, str]:
        sites = client.get("/v1/fabric/sites").json()["data"]
        [site] = [site for site in sites if site["name"] == "gamma"]
        return site["state"], site["detail"]

    assert gamma() == ("pending", "")
    reply = httpx.post(
        f"{hub.base_url}/v1/fabric/sites/gamma/status",
        json={"state": "loading", "detail": "reading weights"},
        headers={"authorization": f"Bearer {key}"},
    )
    assert reply.status_code == 204
    assert gamma() == ("loading", "reading weights")
    launch, token = hub.catalog.add_launch("gamma", MODEL)
    with dialled(hub, token) as socket:
        socket.send(hello(launch.instance, site="gamma"))
        socket.recv(timeout=10)
        wait_until(lambda: gamma() == ("ready", ""))
    wait_until(lambda: gamma()[0] in ("lost", "stopped"))


@pytest.mark.parametrize("deleted", ["replica", "site"])
def test_a_launch_that_another_process_ends_drains_its_instance(
    tmp_path: Path, deleted: str
) -> None:
    settings = GatewaySettings(recheck_s=0.1)
    with (
        running_hub(tmp_path, gateway=settings) as hub,
        Database(f"sqlite:///{tmp_path / 'hub.sqlite'}") as database,
    ):
        ended = hub.sites["alpha"].instance
        others = Catalog(database)
        if deleted == "replica":
            others.end_launch(ended, "wrong weights")
        else:
            others.delete_site("alpha")
        wait_until(lambda: {view.site for view in hub.broker.replicas()} == {"beta"}, timeout_s=60)
        headers = {"Authorization": f"Bearer {hub.api_key}"}
        body = {"model": MODEL, "prompt": "x", "max_tokens": 1}
        reply = httpx.post(f"{hub.base_url}/v1/completions", headers=headers, json=body, timeout=30)
        assert reply.json()["fabric"]["site"] == "beta"
