"""Instances that users bring: who sees them, who ends them, and what their jobs cost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from fabric.broker import BrokerSettings
from fabric.errors import KeyInvalid
from fabric.testing.hub import PROJECT, RunningHub, running_hub

PATIENCE_S = 60.0
PATH = "/v1/fabric/instances"
JOB = {
    "launch": "l-0a1b2c3d",
    "job_id": "4711",
    "account": "m1234",
    "num_nodes": 1,
    "elapsed_s": 90.0,
    "charge": 0.025,
    "unit": "node-hour",
    "source": "sacct",
    "ended_at": "2026-11-21T12:00:00+00:00",
}
BALANCE = {"account": "m1234", "unit": "node-hours", "available": 1204, "needed": 3}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHub]:
    """A hub of this module's own: the places that it brings stay, and cost nothing."""
    settings = BrokerSettings(patience_s=1.0)
    with running_hub(tmp_path_factory.mktemp("own"), broker=settings) as hub:
        yield hub


class Clients:
    """Two keys of one project, one of another, one that may not launch."""

    def __init__(self, hub: RunningHub) -> None:
        hub.keys.add_project("others")
        self.owner = self._client(hub, PROJECT)
        self.colleague = self._client(hub, PROJECT)
        self.stranger = self._client(hub, "others")
        self.reader = self._client(hub, PROJECT, "query")
        self.all = (self.owner, self.colleague, self.stranger, self.reader)

    def _client(self, hub: RunningHub, project: str, *scopes: str) -> httpx.Client:
        _, key = hub.keys.add_key(project, scopes=scopes or ("query", "launch"))
        headers = {"authorization": f"Bearer {key}"}
        return httpx.Client(base_url=hub.base_url, headers=headers, timeout=30)


@pytest.fixture(scope="module")
def clients(hub: RunningHub) -> Iterator[Clients]:
    clients = Clients(hub)
    yield clients
    for client in clients.all:
        client.close()


def model(hub: RunningHub) -> str:
    return hub.catalog.models()[0].ref


def add(hub: RunningHub, client: httpx.Client, **changes: Any) -> dict[str, Any]:
    body = {"model": model(hub), "machine": "delta", **changes}
    reply = client.post(PATH, json=body)
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


def seen(client: httpx.Client) -> set[str]:
    return {one["instance"] for one in client.get(PATH).json()["data"]}


@pytest.mark.parametrize(
    ("sharing", "colleague_owns"), [("private", False), ("project", True), ("shared", True)]
)
def test_an_instance_is_its_owners_to_see_and_to_end(
    hub: RunningHub, clients: Clients, sharing: str, colleague_owns: bool
) -> None:
    instance = add(hub, clients.owner, sharing=sharing)["instance"]
    assert instance in seen(clients.owner)
    assert (instance in seen(clients.colleague)) is colleague_owns
    assert instance not in seen(clients.stranger)
    calls = {
        "drain": {},
        "outlook": {"ready_in_s": 5},
        "job": JOB | {"launch": "l-00000000"},
        "balance": BALANCE,
        "end": {"reason": "mine"},
    }
    for call, body in calls.items():
        reply = clients.stranger.post(f"{PATH}/{instance}/{call}", json=body)
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "not_found")
        assert clients.reader.post(f"{PATH}/{instance}/{call}", json=body).status_code == 403
    mine = clients.colleague.post(f"{PATH}/{instance}/end", json={"reason": "over"})
    assert mine.status_code == (200 if colleague_owns else 404)
    assert clients.owner.post(f"{PATH}/{instance}/end", json={"reason": "over"}).status_code == 200
    assert instance not in seen(clients.owner)


@pytest.mark.parametrize(
    ("sharing", "users"),
    [
        ("private", {"owner"}),
        ("project", {"owner", "colleague", "reader"}),
        ("shared", {"owner", "colleague", "reader", "stranger"}),
    ],
)
def test_its_place_is_seen_by_those_who_may_use_it(
    hub: RunningHub, clients: Clients, sharing: str, users: set[str]
) -> None:
    site = add(hub, clients.owner, sharing=sharing, machine=f"seen-{sharing}")["site"]
    for name in ("owner", "colleague", "reader", "stranger"):
        sites = getattr(clients, name).get("/v1/fabric/sites").json()["data"]
        assert (site in {one["name"] for one in sites}) is (name in users), name


def test_a_token_is_one_launchs_and_void_with_it(hub: RunningHub, clients: Clients) -> None:
    first, second = add(hub, clients.owner), add(hub, clients.owner)
    assert first["token"] != second["token"]
    assert hub.catalog.authenticate_launch(first["token"]).instance == first["instance"]
    ended = clients.owner.post(f"{PATH}/{first['instance']}/end", json={"reason": "done"})
    assert "token" not in ended.text
    with pytest.raises(KeyInvalid):
        hub.catalog.authenticate_launch(first["token"])
    assert hub.catalog.authenticate_launch(second["token"]).instance == second["instance"]


def test_a_token_of_a_launch_is_no_key(hub: RunningHub, clients: Clients) -> None:
    token = add(hub, clients.owner)["token"]
    headers = {"authorization": f"Bearer {token}"}
    assert httpx.get(f"{hub.base_url}{PATH}", headers=headers).status_code == 401


def test_the_sites_of_the_fabric_are_nobodys_own(hub: RunningHub, clients: Clients) -> None:
    launches = [one for one in hub.catalog.launches() if hub.catalog.get_site(one.site).own is None]
    for launch in launches:
        reply = clients.owner.post(f"{PATH}/{launch.instance}/end", json={"reason": "mine"})
        assert reply.status_code == 404
    assert not seen(clients.owner) & {launch.instance for launch in launches}


def test_what_is_said_of_a_wait_is_believed_until_the_launch_ends(
    hub: RunningHub, clients: Clients
) -> None:
    launch = add(hub, clients.owner, machine="far")
    path = f"{PATH}/{launch['instance']}"
    options = {"sites": [launch["site"]], "deadline_s": 2}
    body = {"model": model(hub), "prompt": "hi", "max_tokens": 1, "fabric": options}

    def ask() -> tuple[int, str, httpx.Response]:
        reply = clients.owner.post("/v1/completions", json=body)
        return reply.status_code, reply.json()["error"]["code"], reply

    def refused() -> int:
        """Return when to come again, as is told once the hub has been up for its patience."""
        until = time.monotonic() + PATIENCE_S
        while (told := ask())[0] != 503:
            assert time.monotonic() < until, told[2].text
        assert told[1] == "no_replica"
        return int(told[2].headers["retry-after"])

    assert refused() == 5
    assert clients.owner.post(f"{path}/outlook", json={"ready_in_s": 700}).status_code == 200
    assert 600 <= refused() <= 700
    clients.owner.post(f"{path}/outlook", json={"ready_in_s": 0})
    assert ask()[:2] == (504, "deadline_exceeded")
    clients.owner.post(f"{path}/end", json={"reason": "over"})
    # A report that was under way when the launch ended changes nothing.
    clients.owner.post(f"{path}/outlook", json={"ready_in_s": 0})
    assert refused() == 5


def test_a_jobs_charge_is_a_line_of_the_statement_once(hub: RunningHub, clients: Clients) -> None:
    instance = add(hub, clients.owner)["instance"]
    job = JOB | {"launch": "l-11111111"}
    first = clients.owner.post(f"{PATH}/{instance}/job", json=job)
    assert first.status_code == 200, first.text
    again = clients.owner.post(f"{PATH}/{instance}/job", json=job | {"charge": 9})
    assert again.json() == first.json()
    lines = clients.owner.get("/v1/fabric/usage?limit=1000").json()["lines"]
    [memo] = [line for line in lines if line["kind"] == "memo" and "l-11111111" in line["memo"]]
    assert (memo["job"], memo["amount_usu"]) == ("4711", 0)
    assert "0.025 node-hours of m1234 (1 node, 90 s)" in memo["memo"]
    hub.ledger.verify()


@pytest.mark.parametrize(
    "wrong",
    [
        {"charge": -1},
        {"charge": "NaN"},
        {"charge": 1e12},
        {"elapsed_s": -1},
        {"num_nodes": 0},
        {"job_id": ""},
        {"job_id": "1; rm"},
        {"launch": "../x"},
        {"unit": "a\nb"},
        {"source": "me"},
        {"ended_at": "2026-11-21T12:00:00"},
        {"more": 1},
    ],
    ids=str,
)
def test_a_report_that_makes_no_sense_is_refused(
    hub: RunningHub, clients: Clients, wrong: dict[str, object]
) -> None:
    instance = add(hub, clients.owner)["instance"]
    reply = clients.owner.post(f"{PATH}/{instance}/job", json=JOB | wrong)
    assert reply.status_code == 400, reply.text


@pytest.mark.parametrize("ready_in_s", [-1, "soon", None, 1e12])
def test_a_wait_that_makes_no_sense_is_refused(
    hub: RunningHub, clients: Clients, ready_in_s: object
) -> None:
    instance = add(hub, clients.owner)["instance"]
    body = {"ready_in_s": ready_in_s}
    assert clients.owner.post(f"{PATH}/{instance}/outlook", json=body).status_code == 400


@pytest.mark.parametrize(
    ("sharing", "owners"),
    [
        ("private", {"owner"}),
        ("project", {"owner", "colleague", "reader"}),
        ("shared", {"owner", "colleague", "reader"}),
    ],
)
def test_what_an_account_has_left_is_told_to_those_whose_it_is(
    hub: RunningHub, clients: Clients, sharing: str, owners: set[str]
) -> None:
    launch = add(hub, clients.owner, sharing=sharing, machine=f"paid-{sharing}")
    path = f"{PATH}/{launch['instance']}/balance"
    for available in (7.5, 1204):
        told = clients.owner.post(path, json=BALANCE | {"available": available})
        assert told.status_code == 200, told.text
    for name in ("owner", "colleague", "reader", "stranger"):
        sites = getattr(clients, name).get("/v1/fabric/sites").json()["data"]
        [detail] = [one["detail"] for one in sites if one["name"] == launch["site"]] or [""]
        is_told = detail.startswith("account m1234: 1,204 node-hours left, asked ")
        assert (is_told, bool(detail)) == (name in owners, name in owners), name


def test_an_account_that_falls_short_is_said_to(hub: RunningHub, clients: Clients) -> None:
    launch = add(hub, clients.owner, machine="poor")
    poor = BALANCE | {"available": -2}
    clients.owner.post(f"{PATH}/{launch['instance']}/balance", json=poor)
    sites = clients.owner.get("/v1/fabric/sites").json()["data"]
    [detail] = [one["detail"] for one in sites if one["name"] == launch["site"]]
    assert "-2 node-hours left" in detail
    assert detail.endswith("; too little for what was asked for")


@pytest.mark.parametrize(
    "wrong",
    [
        {"available": "NaN"},
        {"available": 1e13},
        {"needed": -1},
        {"needed": "Infinity"},
        {"account": "a; rm"},
        {"account": ""},
        {"unit": "a\nb"},
        {"more": 1},
    ],
    ids=str,
)
def test_a_balance_that_makes_no_sense_is_refused(
    hub: RunningHub, clients: Clients, wrong: dict[str, object]
) -> None:
    instance = add(hub, clients.owner)["instance"]
    reply = clients.owner.post(f"{PATH}/{instance}/balance", json=BALANCE | wrong)
    assert reply.status_code == 400, reply.text


def test_an_instance_for_all_cannot_keep_its_owners_requests(
    hub: RunningHub, clients: Clients
) -> None:
    body = {"model": model(hub), "machine": "delta", "sharing": "shared", "overflow": False}
    reply = clients.owner.post(PATH, json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "overflow")
    sites = {
        (sharing, overflow): add(hub, clients.owner, sharing=sharing, overflow=overflow)["site"]
        for sharing in ("private", "project")
        for overflow in (True, False, None)
    }
    assert len(set(sites.values())) == 4, "with and without are places of their own"
    told = {one["site"]: one["overflow"] for one in clients.owner.get(PATH).json()["data"]}
    assert all(told[site] is bool(overflow) for (_, overflow), site in sites.items())
