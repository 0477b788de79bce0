"""A site whose instance forges, inflates, floods and comes late harms only its own requests.

The rogue is a peer of the real session route: whatever the protocol lets it send, it may say.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from fabric.broker import BrokerSettings
from fabric.errors import KeyInvalid
from fabric.messages import Hello
from fabric.testing.engine import FixedDelayEngine
from fabric.testing.hub import MODEL, PROJECT, RunningHub, running_hub, wait_until

PATIENCE_S = 60.0
MAX_TOKENS = 4
PROMPT = "one two three"
BOUND_USU = 3 * 1 + MAX_TOKENS * 2
"""What the longest answer costs at the rig's prices."""

Task = dict[str, Any]
Script = Callable[[Task], Iterator[dict[str, Any] | str]]


@dataclass(slots=True, kw_only=True)
class Rogue:
    """An instance that joined as it should, and then answers tasks by a script."""

    hub: RunningHub
    instance: str
    socket: ClientConnection
    script: Script
    tasks: list[Task] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def is_replica(self) -> bool:
        return self.instance in {view.instance for view in self.hub.broker.replicas()}

    def serve(self) -> None:
        with suppress(ConnectionClosed):
            for message in self.socket:
                for line in str(message).split("\n"):
                    task = json.loads(line)
                    if task["type"] == "task":
                        self.tasks.append(task)
                        send(self.socket, self.script(task))

    def beat(self) -> None:
        with suppress(ConnectionClosed):
            while not self.over.wait(0.5):
                self.socket.send('{"type":"heartbeat","state":"ready","load":{}}')


@contextmanager
def joined(hub: RunningHub, script: Script) -> Iterator[Rogue]:
    """Yield a rogue that the broker may choose; it is gone afterwards."""
    launch, secret = hub.catalog.add_launch("rogue", MODEL)
    info = FixedDelayEngine().info
    hello = Hello(
        instance=launch.instance,
        site="rogue",
        model=launch.model,
        digest=info.digest,
        limits=info.limits,
        dtype=info.dtype,
        engine=info.engine,
    )
    headers = {"Authorization": f"Bearer {secret}"}
    with connect(hub.session_url, additional_headers=headers, max_size=None) as socket:
        rogue = Rogue(hub=hub, instance=launch.instance, socket=socket, script=script)
        socket.send(hello.model_dump_json())
        threads = [threading.Thread(target=each) for each in (rogue.serve, rogue.beat)]
        for thread in threads:
            thread.start()
        try:
            wait_until(rogue.is_replica, timeout_s=PATIENCE_S)
            yield rogue
        finally:
            rogue.over.set()
            socket.close()
            for thread in threads:
                thread.join()
    wait_until(lambda: not rogue.is_replica(), timeout_s=PATIENCE_S)


def send(socket: ClientConnection, frames: Iterator[dict[str, Any] | str]) -> None:
    for frame in frames:
        socket.send(frame if isinstance(frame, str) else json.dumps(frame))


def frame(task: Task, type: str, **fields: object) -> dict[str, Any]:
    return {"type": type, "task_id": task["id"], "attempt": task["attempt"], **fields}


def token(task: Task, position: int, *, last: bool = False, **fields: object) -> dict[str, Any]:
    said = {"choice": 0, "position": position, "token_id": 1, "text": "lie "}
    return frame(task, "token", **said, finish_reason="length" if last else None) | fields


def finished(task: Task, **usage: object) -> dict[str, Any]:
    return frame(task, "finished", finish_reasons=["length"], usage=usage)


def honest(task: Task) -> Iterator[dict[str, Any]]:
    """Answer as an instance should."""
    yield frame(task, "accepted", prompt_tokens=3)
    for position in range(MAX_TOKENS):
        yield token(task, position, last=position == MAX_TOKENS - 1)
    yield finished(task, prompt_tokens=3, output_tokens=MAX_TOKENS)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHub]:
    # Trials and their ends would send requests elsewhere than these tests mean them to go.
    settings = BrokerSettings(explore=0.0, eject_after=10_000, patience_s=0.5)
    directory: Path = tmp_path_factory.mktemp("hub")
    with running_hub(directory, sites=("honest",), broker=settings) as hub:
        hub.catalog.add_site("rogue")
        yield hub


@pytest.fixture(autouse=True)
def _unharmed(hub: RunningHub) -> Iterator[None]:
    """Whatever the rogue did: the books add up, nothing is held, and the honest site answers."""
    yield
    reply = ask(hub, sites=["honest"])
    assert reply.status_code == 200, reply.text
    wait_until(lambda: hub.ledger.allocations(PROJECT)[0].held_usu == 0, timeout_s=PATIENCE_S)
    hub.ledger.verify()


def ask(hub: RunningHub, *, stream: bool = False, **options: object) -> httpx.Response:
    options = {"sites": ["rogue"], **options}
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": MAX_TOKENS, "stream": stream}
    return httpx.post(
        f"{hub.base_url}/v1/completions",
        headers={"authorization": f"Bearer {hub.api_key}"},
        json=body | {"temperature": 0, "fabric": options},
        timeout=PATIENCE_S,
    )


def available_usu(hub: RunningHub) -> int:
    (allocation,) = hub.ledger.allocations(PROJECT)
    return allocation.available_usu + allocation.held_usu


def charged(hub: RunningHub, before_usu: int) -> int:
    wait_until(lambda: hub.ledger.allocations(PROJECT)[0].held_usu == 0, timeout_s=PATIENCE_S)
    return before_usu - available_usu(hub)


def test_the_rig_answers_when_the_rogue_behaves(hub: RunningHub) -> None:
    before_usu = available_usu(hub)
    with joined(hub, honest):
        reply = ask(hub)
        assert reply.json()["choices"][0]["text"] == "lie " * MAX_TOKENS
        assert charged(hub, before_usu) == BOUND_USU


HUGE = 10**18
INFLATED = {
    "prompt_tokens": HUGE,
    "cached_prompt_tokens": HUGE,
    "output_tokens": HUGE,
    "drafted_tokens": HUGE,
    "hook_bytes_in": HUGE,
    "hook_bytes_out": HUGE,
    "queue_s": 1e300,
    "device_s": 1e300,
}


@pytest.mark.parametrize("factor", [1, 10**12], ids=["huge", "beyond any integer of a database"])
def test_inflated_usage_is_charged_and_recorded_as_what_arrived(
    hub: RunningHub, factor: int
) -> None:
    def inflate(task: Task) -> Iterator[dict[str, Any]]:
        *start, _ = honest(task)
        yield start[0] | {"prompt_tokens": HUGE * factor}
        yield from start[1:]
        claimed = {name: n if isinstance(n, float) else n * factor for name, n in INFLATED.items()}
        yield finished(task, **claimed)

    before_usu = available_usu(hub)
    with joined(hub, inflate):
        reply = ask(hub)
    assert reply.status_code == 200
    usage = reply.json()["usage"]
    assert usage["completion_tokens"] == MAX_TOKENS
    assert charged(hub, before_usu) <= max(BOUND_USU, usage["prompt_tokens"] + 2 * MAX_TOKENS)
    run = hub.catalog.run(reply.json()["fabric"]["run"])
    assert run.usage.output_tokens == MAX_TOKENS
    assert run.usage.device_s + run.usage.queue_s < PATIENCE_S
    assert (run.usage.hook_bytes_in, run.usage.hook_bytes_out) == (0, 0)


def too_many(task: Task) -> Iterator[dict[str, Any]]:
    yield frame(task, "accepted", prompt_tokens=3)
    for position in range(10 * MAX_TOKENS):
        yield token(task, position)


def unfinished(task: Task) -> Iterator[dict[str, Any]]:
    yield frame(task, "accepted", prompt_tokens=3)
    yield token(task, 0)
    yield finished(task, prompt_tokens=3, output_tokens=MAX_TOKENS)


def skipping(task: Task) -> Iterator[dict[str, Any]]:
    yield frame(task, "accepted", prompt_tokens=3)
    yield token(task, 2)


def of_another_choice(task: Task) -> Iterator[dict[str, Any]]:
    yield frame(task, "accepted", prompt_tokens=3)
    yield token(task, 0) | {"choice": 7}


def giant_token(task: Task) -> Iterator[dict[str, Any]]:
    yield frame(task, "accepted", prompt_tokens=3)
    yield token(task, 0) | {"text": "x" * 2**22}


def giant_frame(task: Task) -> Iterator[dict[str, Any] | str]:
    yield frame(task, "accepted", prompt_tokens=3)
    yield "x" * 2**25


def giant_failure(task: Task) -> Iterator[dict[str, Any]]:
    failure = {"code": "row_failed", "message": "x" * 2**22}
    yield frame(task, "failed", failure=failure)


def infinite(task: Task) -> Iterator[dict[str, Any] | str]:
    *start, _ = honest(task)
    yield from start
    text = json.dumps(finished(task, device_s=1.5))
    yield text.replace("1.5", "Infinity")


def negative(task: Task) -> Iterator[dict[str, Any]]:
    *start, _ = honest(task)
    yield from start
    yield finished(task, output_tokens=-MAX_TOKENS)


def embedding(task: Task) -> Iterator[dict[str, Any]]:
    yield frame(task, "embedding", data="AAAAAA==")


def ticketless(task: Task) -> Iterator[dict[str, Any]]:
    yield {"type": "metered", "task_id": "run_none", "attempt": 1, "usage": {}}
    yield frame(task, "failed", failure={"code": "engine_stopped", "message": "I leave."})


def as_the_hub(task: Task) -> Iterator[dict[str, Any]]:
    failure = {"code": KeyInvalid.code, "message": "Log in at http://evil.example."}
    yield frame(task, "failed", failure=failure)


LIES = [
    *(too_many, unfinished, skipping, of_another_choice, giant_token, giant_frame, giant_failure),
    *(embedding, ticketless, as_the_hub),
]


@pytest.mark.parametrize("script", LIES, ids=lambda script: script.__name__)
def test_a_reply_that_cannot_be_true_is_taken_elsewhere_or_ends_typed(
    hub: RunningHub, script: Script
) -> None:
    before_usu = available_usu(hub)
    with joined(hub, script) as rogue:
        alone = ask(hub)
    assert rogue.tasks
    assert alone.status_code in (502, 503), alone.text
    assert "evil" not in alone.text
    assert len(alone.content) < 2**16
    assert charged(hub, before_usu) <= BOUND_USU


@pytest.mark.parametrize("script", [infinite, negative], ids=lambda script: script.__name__)
def test_usage_that_is_no_number_ends_the_session_and_what_arrived_is_charged(
    hub: RunningHub, script: Script
) -> None:
    before_usu = available_usu(hub)
    with joined(hub, script) as rogue:
        reply = ask(hub)
        wait_until(lambda: not rogue.is_replica(), timeout_s=PATIENCE_S)
    assert reply.status_code == 200
    assert reply.json()["choices"][0]["text"] == "lie " * MAX_TOKENS
    assert charged(hub, before_usu) == BOUND_USU


def test_a_greedy_answer_goes_on_at_the_honest_site(hub: RunningHub) -> None:
    """The rogue is asked first, because the prompt's data is said to be there."""
    before_usu = available_usu(hub)
    with joined(hub, giant_token) as rogue:
        data = {"data_site": "rogue", "data_bytes": 10**12, "sites": ["rogue", "honest"]}
        reply = ask(hub, **data)
    assert rogue.tasks
    assert reply.status_code == 200, reply.text
    assert reply.json()["fabric"]["site"] == "honest"
    assert "lie" not in reply.json()["choices"][0]["text"]
    assert charged(hub, before_usu) == BOUND_USU


def test_what_a_rogue_says_of_anothers_task_reaches_nobody(hub: RunningHub) -> None:
    """The victim's task runs at the honest site, and the rogue knows its id."""
    engine = hub.sites["honest"].engine
    engine.token_s = 0.5
    try:
        with joined(hub, honest) as rogue, httpx.Client(timeout=PATIENCE_S) as client:
            body = {"model": MODEL, "prompt": PROMPT, "max_tokens": MAX_TOKENS, "stream": True}
            with client.stream(
                "POST",
                f"{hub.base_url}/v1/completions",
                headers={"authorization": f"Bearer {hub.api_key}"},
                json=body | {"fabric": {"sites": ["honest"]}},
            ) as reply:
                run = reply.headers["x-request-id"]
                send(rogue.socket, honest({"id": run, "attempt": 1}))
                text = "".join(reply.iter_text())
            assert rogue.is_replica()
    finally:
        engine.token_s = 0.0
    assert text.count('"text"') >= MAX_TOKENS
    assert "lie" not in text
    assert "[DONE]" in text


def test_a_second_end_and_a_late_one_change_nothing(hub: RunningHub) -> None:
    def twice(task: Task) -> Iterator[dict[str, Any]]:
        yield from honest(task)
        yield finished(task, prompt_tokens=3, output_tokens=MAX_TOKENS)
        yield token(task, MAX_TOKENS)
        yield frame(task, "failed", failure={"code": "row_failed", "message": "No."})

    before_usu = available_usu(hub)
    with joined(hub, twice):
        replies = [ask(hub) for _ in range(3)]
        assert [reply.status_code for reply in replies] == [200] * 3
    assert charged(hub, before_usu) == 3 * BOUND_USU


def test_a_reply_after_the_deadline_is_neither_delivered_nor_charged(hub: RunningHub) -> None:
    over = threading.Event()

    def late(task: Task) -> Iterator[dict[str, Any]]:
        over.wait(PATIENCE_S)
        yield from honest(task)

    before_usu = available_usu(hub)
    with joined(hub, late) as rogue:
        reply = ask(hub, deadline_s=1)
        assert reply.status_code == 504
        over.set()
        wait_until(lambda: bool(rogue.tasks), timeout_s=PATIENCE_S)
        again = ask(hub)
        assert again.status_code == 200
    assert charged(hub, before_usu) == BOUND_USU
