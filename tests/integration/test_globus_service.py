"""The rules of the stand-in of Globus Compute: who may what, how much, and what an agent may send.

The agent in these tests is this file: it has the registration and the queues of a real one.
"""

import json
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

import dill
import httpx
import pika
import pytest
from globus_compute_common.messagepack import pack
from globus_compute_common.messagepack.message_types import EPStatusReport, Result
from globus_compute_sdk import Client
from globus_compute_sdk.serialize import ComputeSerializer, PureSourceTextInspect
from globus_sdk import ComputeAPIError
from pika.adapters.blocking_connection import BlockingChannel
from pika.exceptions import ChannelClosedByBroker

from fabric.testing.globus import Globus, PublishedLimits
from fabric.testing.hub import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

LIMITS = PublishedLimits(requests=200, window_s=4.0, payload_bytes=100_000, result_kept_s=1.0)
SERIALIZER = ComputeSerializer()


@pytest.fixture(scope="module", autouse=True)
def limits(globus: Globus) -> Iterator[None]:
    with globus.limited(LIMITS):
        yield


@pytest.fixture(scope="module")
def clients(globus: Globus) -> dict[str, Client]:
    source = PureSourceTextInspect()
    return {name: globus.client(name, code_serialization_strategy=source) for name in globus.users}


def one() -> int:
    return 1


def raw(globus: Globus, clients: dict[str, Client], user: str) -> httpx.Client:
    header = clients[user].authorizer.get_authorization_header()  # type: ignore[union-attr]
    headers = {"authorization": header} if header else {}
    return httpx.Client(base_url=globus.url, headers=headers, trust_env=False)


@contextmanager
def channel(url: str) -> Iterator[BlockingChannel]:
    connection = pika.BlockingConnection(pika.URLParameters(url))
    try:
        opened = connection.channel()
        opened.confirm_delivery()
        yield opened
    finally:
        if connection.is_open:
            connection.close()


@dataclass
class Agent:
    """An endpoint as the service knows it."""

    client: Client
    registration: dict[str, Any]

    @classmethod
    def register(cls, client: Client, **options: Any) -> "Agent":
        return cls(client, client.register_endpoint("agent", None, **options))

    @property
    def id(self) -> str:
        return str(self.registration["endpoint_id"])

    def submit(self, function: str, client: Client | None = None, *, wide: int = 0) -> str:
        batch = (client or self.client).create_batch()
        batch.add(function, ("x" * wide,) if wide else ())
        answer: Any = (client or self.client).batch_run(self.id, batch)
        return str(answer["tasks"][function][0])

    def command(self) -> dict[str, Any]:
        """The next command it is given."""
        queue = self.registration["command_queue_info"]
        with channel(queue["connection_url"]) as incoming:
            for method, _, body in incoming.consume(queue["queue"], inactivity_timeout=20):
                assert body is not None, "no command came"
                incoming.basic_ack(method.delivery_tag)
                command: dict[str, Any] = json.loads(body)
                return command
        raise AssertionError("the queue is gone")

    def credentials(self) -> dict[str, Any]:
        """What the user endpoint gets that it is told to start."""
        started: dict[str, Any] = self.command()["kwargs"]["amqp_creds"]
        return started


def send(credentials: dict[str, Any], body: bytes, kind: str = "result") -> None:
    info = credentials[f"{kind}_queue_info"]
    with channel(info["connection_url"]) as outgoing:
        options = dict(info["queue_publish_kwargs"])
        properties = pika.BasicProperties(**options.pop("properties"))
        outgoing.basic_publish(body=body, properties=properties, **options)


def get_result(task: str, data: str = "") -> bytes:
    serialized = SERIALIZER.serialize("done")
    worker = {"python_version": platform.python_version(), "dill_version": dill.__version__}
    return pack(Result(task_id=UUID(task), data=data or serialized, details=worker))


def test_who_says_nothing_or_nonsense_is_turned_away(
    globus: Globus, clients: dict[str, Client]
) -> None:
    url = f"{globus.url}/v2/endpoints"
    for headers in ({}, {"authorization": "Bearer nonsense"}, {"authorization": "Basic eDp5"}):
        answer = httpx.get(url, headers=headers, trust_env=False)
        assert (answer.status_code, answer.json()["code"]) == (401, "USER_UNAUTHENTICATED")
    with raw(globus, clients, "alice") as http:
        assert http.get("/v2/endpoints/not-a-uuid").status_code == 422
        assert http.post("/v3/functions", content=b"{").status_code == 422
        assert http.post("/v3/functions", json={"function_name": 3}).status_code == 422
        assert http.get(f"/v2/endpoints/{uuid4()}").json()["code"] == "ENDPOINT_NOT_FOUND"
        assert http.get(f"/v2/functions/{uuid4()}").json()["code"] == "FUNCTION_NOT_FOUND"
        assert http.get(f"/v2/tasks/{uuid4()}").json()["code"] == "TASK_NOT_FOUND"
        assert http.get(f"/v2/taskgroup/{uuid4()}").json()["code"] == "TASK_GROUP_NOT_FOUND"


def test_an_expired_token_is_renewed_once(globus: Globus, clients: dict[str, Client]) -> None:
    def renewals() -> int:
        return sum(one.path == "/v2/oauth2/token" for one in globus.requests())

    function = clients["alice"].register_function(one)
    globus.expire_tokens()
    before = renewals()
    for _ in range(3):
        assert clients["alice"].get_function(function)["function_name"] == "one"
    assert renewals() == before + 1


def test_an_endpoint_is_its_owners(clients: dict[str, Client]) -> None:
    agent, stranger = Agent.register(clients["site-a"]), clients["bob"]
    function = stranger.register_function(one)
    for call in (
        lambda: stranger.get_endpoint_status(agent.id),
        lambda: stranger.delete_endpoint(agent.id),
        lambda: stranger.register_endpoint("agent", agent.id),
        lambda: agent.submit(function, stranger),
    ):
        with pytest.raises(ComputeAPIError, match="ENDPOINT_ACCESS_FORBIDDEN"):
            call()
    assert agent.id not in {one["uuid"] for one in stranger.get_endpoints(role="any")}
    agent.client.stop_endpoint(agent.id)
    with pytest.raises(ComputeAPIError, match="RESOURCE_LOCKED"):
        agent.client.register_endpoint("agent", agent.id)
    agent.client.delete_endpoint(agent.id)
    with pytest.raises(ComputeAPIError, match="ENDPOINT_NOT_FOUND"):
        agent.client.get_endpoint_status(agent.id)


def test_a_function_is_called_by_those_it_is_shared_with(
    globus: Globus, clients: dict[str, Client]
) -> None:
    alice = clients["alice"]
    agent = Agent.register(clients["site-a"], multi_user=True, public=True)
    allowed = {
        "alice": (alice.register_function(one), {"alice"}),
        "group": (alice.register_function(one, group=globus.group_id), {"alice", "hub"}),
        "all": (alice.register_function(one, public=True), {"alice", "bob", "hub"}),
    }
    for function, users in allowed.values():
        for name in ("alice", "bob", "hub"):
            if name in users:
                assert agent.submit(function, clients[name])
                assert clients[name].get_function(function)["function_name"] == "one"
                continue
            with pytest.raises(ComputeAPIError, match="FUNCTION_ACCESS_FORBIDDEN"):
                agent.submit(function, clients[name])
            with pytest.raises(ComputeAPIError, match="FUNCTION_ACCESS_FORBIDDEN"):
                clients[name].get_function(function)
    with pytest.raises(ComputeAPIError, match="FUNCTION_ACCESS_FORBIDDEN"):
        clients["bob"].delete_function(allowed["all"][0])
    alice.delete_function(allowed["all"][0])
    with pytest.raises(ComputeAPIError, match="FUNCTION_NOT_FOUND"):
        agent.submit(allowed["all"][0], clients["bob"])


def test_a_closed_endpoint_takes_its_own_functions_only(clients: dict[str, Client]) -> None:
    client = clients["site-a"]
    permitted, other = client.register_function(one), client.register_function(one)
    agent = Agent.register(client, allowed_functions=[permitted])
    assert client.get_allowed_functions(agent.id)["functions"] == [permitted]
    assert agent.submit(permitted)
    with pytest.raises(ComputeAPIError, match="FUNCTION_NOT_PERMITTED") as refused:
        agent.submit(other)
    assert refused.value.http_status == 403


def test_equal_submissions_share_a_user_endpoint_and_others_do_not(
    clients: dict[str, Client],
) -> None:
    client = clients["site-a"]
    agent, function = Agent.register(client), client.register_function(one)

    def started(**options: Any) -> str:
        batch = client.create_batch(user_endpoint_config=options)
        batch.add(function, ())
        client.batch_run(agent.id, batch)
        return str(agent.credentials()["endpoint_id"])

    first = started(a=1, b=2)
    assert started(b=2, a=1) == first
    assert started(a=1) != first


def test_what_is_too_large_is_refused_and_counted(
    globus: Globus, clients: dict[str, Client]
) -> None:
    client, counted = clients["site-b"], len(globus.violations())
    agent, function = Agent.register(client), client.register_function(one)
    with pytest.raises(ComputeAPIError) as refused:
        agent.submit(function, wide=LIMITS.payload_bytes)
    assert refused.value.http_status == 413
    batch = client.create_batch()
    for _ in range(3):
        batch.add(function, ("x" * (LIMITS.payload_bytes // 3),))
    with pytest.raises(ComputeAPIError) as refused:
        client.batch_run(agent.id, batch)
    assert refused.value.http_status == 413
    with pytest.raises(ComputeAPIError) as refused:
        client.register_source_code(f"def one():\n    {'1' * LIMITS.payload_bytes}\n", "one")
    assert refused.value.http_status == 413
    assert [text.partition(":")[0] for text in globus.violations()[counted:]] == ["site-b"] * 3


def test_requests_above_the_rate_are_refused_and_counted(
    globus: Globus, clients: dict[str, Client]
) -> None:
    counted = len(globus.violations())

    def refusals() -> list[str]:
        new = globus.violations()[counted:]
        return [text for text in new if text.startswith("bob: more than")]

    with raw(globus, clients, "bob") as http, raw(globus, clients, "hub") as other:
        answers = [http.get("/v2/version") for _ in range(LIMITS.requests + 5)]
        refused = [answer for answer in answers if answer.status_code == 429]
        assert len(refused) >= 5
        assert len(refusals()) == len(refused)
        assert other.get("/v2/version").status_code == 200
        again_at = time.monotonic() + int(refused[-1].headers["retry-after"])
        wait_until(lambda: time.monotonic() > again_at, timeout_s=60)
        assert http.get("/v2/version").status_code == 200


def test_a_result_reaches_its_user_once(globus: Globus, clients: dict[str, Client]) -> None:
    client = clients["site-a"]
    agent, function = Agent.register(client), client.register_function(one)
    task = agent.submit(function)
    assert client.get_task(task)["pending"]
    credentials = agent.credentials()
    send(credentials, get_result(task))
    wait_until(lambda: not client.get_task(task)["pending"], timeout_s=30)
    assert client.get_result(task) == "done"
    # A second one changes nothing; the heartbeat behind it in the queue says it was handled.
    send(credentials, get_result(task, "other"))
    _send_behind(globus, credentials)
    assert _outcome(globus, task)["result"] != "other"
    with pytest.raises(ComputeAPIError, match="TASK_NOT_FOUND"):
        clients["bob"].get_task(task)
    assert clients["bob"].get_batch_result([task])[task]["pending"]


def test_an_endpoint_answers_its_own_tasks_alone(
    globus: Globus, clients: dict[str, Client]
) -> None:
    client, bob = clients["site-a"], clients["bob"]
    agent, other = Agent.register(client), Agent.register(bob)
    task = agent.submit(client.register_function(one))
    other.submit(bob.register_function(one))
    mine, theirs = agent.credentials(), other.credentials()
    send(theirs, get_result(task))
    _send_behind(globus, theirs)
    assert _outcome(globus, task) == {}
    for kind, key in (("result", "results"), ("heartbeat", "heartbeat")):
        forged = json.loads(json.dumps(theirs))
        options = forged[f"{kind}_queue_info"]["queue_publish_kwargs"]
        options["routing_key"] = f"{mine['endpoint_id']}.{key}"
        with pytest.raises(ChannelClosedByBroker, match="ACCESS_REFUSED"):
            send(forged, get_result(task), kind)
    url = theirs["task_queue_info"]["connection_url"]
    for queue in (
        mine["task_queue_info"]["queue"],
        agent.registration["command_queue_info"]["queue"],
        "results",
    ):
        with channel(url) as reading, pytest.raises(ChannelClosedByBroker, match="ACCESS_REFUSED"):
            next(iter(reading.consume(queue, inactivity_timeout=5)))


def test_results_are_read_by_their_user_alone_and_not_kept_for_ever(
    globus: Globus, clients: dict[str, Client]
) -> None:
    client, bob = clients["site-a"], clients["bob"]
    agent, function = Agent.register(client), client.register_function(one)
    batch = client.create_batch(create_websocket_queue=True)
    batch.add(function, ())
    answer: Any = client.batch_run(agent.id, batch)
    task, group = answer["tasks"][function][0], answer["task_group_id"]
    own = client.get_result_amqp_url()
    queue = f"{own['queue_prefix']}{group}"
    url = bob.get_result_amqp_url()["connection_url"]
    with channel(url) as reading, pytest.raises(ChannelClosedByBroker, match="ACCESS_REFUSED"):
        next(iter(reading.consume(queue, inactivity_timeout=5)))
    with pytest.raises(ComputeAPIError, match="TASK_GROUP_ACCESS_FORBIDDEN"):
        bob._compute_web_client.v2.get_task_group(group)
    send(agent.credentials(), get_result(task))
    with channel(own["connection_url"]) as reading:

        def num_waiting() -> int:
            return int(reading.queue_declare(queue, passive=True).method.message_count)

        wait_until(lambda: num_waiting() == 1, timeout_s=30)
        wait_until(lambda: num_waiting() == 0, timeout_s=30)
    assert client.get_result(task) == "done"


def test_a_result_that_is_too_large_fails_its_task(
    globus: Globus, clients: dict[str, Client]
) -> None:
    client = clients["site-a"]
    agent = Agent.register(client)
    task = agent.submit(client.register_function(one))
    send(agent.credentials(), get_result(task, "x" * (LIMITS.payload_bytes + 1)))
    wait_until(lambda: bool(_outcome(globus, task)), timeout_s=30)
    assert _outcome(globus, task)["status"] == "failed"
    assert f"at most {LIMITS.payload_bytes}" in str(_outcome(globus, task)["exception"])


def test_garbage_from_an_endpoint_is_dropped(globus: Globus, clients: dict[str, Client]) -> None:
    client = clients["site-a"]
    agent = Agent.register(client)
    task = agent.submit(client.register_function(one))
    credentials = agent.credentials()
    for body in (b"", b"\x00", b"\x01{", b"not a message", pack(_report(str(uuid4())))[:20]):
        send(credentials, body)
    send(credentials, get_result(task))
    wait_until(lambda: bool(_outcome(globus, task)), timeout_s=30)
    assert _outcome(globus, task)["status"] == "success"


def test_a_start_that_fails_fails_the_tasks_that_wait(
    globus: Globus, clients: dict[str, Client]
) -> None:
    client = clients["site-a"]
    agent = Agent.register(client)
    task = agent.submit(client.register_function(one))
    credentials = agent.credentials()
    send(credentials, pack(_report(credentials["endpoint_id"], error="no such partition")))
    wait_until(lambda: bool(_outcome(globus, task)), timeout_s=30)
    assert _outcome(globus, task)["exception"] == "no such partition"


def test_nothing_is_forgotten_when_the_service_is_killed(
    globus: Globus, clients: dict[str, Client]
) -> None:
    client = clients["site-a"]
    agent = Agent.register(client)
    task = agent.submit(client.register_function(one))
    credentials = agent.credentials()
    globus.stop_service()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{globus.url}/v2/version", trust_env=False)
    send(credentials, get_result(task))
    globus.start_service()
    wait_until(lambda: not client.get_task(task)["pending"], timeout_s=30)
    assert client.get_result(task) == "done"
    assert client.get_endpoint_status(agent.id)["status"] == "offline"


def _report(endpoint_id: str, **state: Any) -> EPStatusReport:
    return EPStatusReport(
        endpoint_id=UUID(endpoint_id),
        global_state={"heartbeat_period": 5.0, **state},
        task_statuses={},
    )


def _send_behind(globus: Globus, credentials: dict[str, Any]) -> None:
    """Return when all that was sent before has been handled."""
    mark = str(uuid4())
    send(credentials, pack(_report(credentials["endpoint_id"], mark=mark)))
    wait_until(
        lambda: (globus.report(credentials["endpoint_id"]) or {}).get("mark") == mark, timeout_s=30
    )


def _outcome(globus: Globus, task_id: str) -> dict[str, Any]:
    task = globus.task(task_id)
    assert task is not None
    return task.outcome or {}
