"""A thousand clients at once: each is answered or refused as it should be, and nobody hangs."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from fabric.auth import Keys
from fabric.broker import BrokerSettings
from fabric.engine.interface import EventSink
from fabric.ledger import Ledger
from fabric.messages import Event, Limits, Request, Task, TextInput
from fabric.testing.engine import FixedDelayEngine
from fabric.testing.hub import RunningHub, running_hub, wait_until

NUM_CLIENTS = 1_000
NUM_MODEST = 20
ROWS = 32
MODEST = "three four"
LIMIT_S = 300.0
MAX_GROWTH_BYTES = 400 * 2**20


@dataclass(frozen=True, slots=True)
class Reply:
    """What one client got."""

    kind: str
    status: int
    error: dict[str, object] | None
    retry_after: str | None
    whole: bool


class GatedEngine(FixedDelayEngine):
    """Says nothing while its gate is closed, so that a line forms however slow the machine is;
    keeps what it was asked for, in that order.
    """

    def __init__(self) -> None:
        limits = Limits(context_tokens=2048, max_rows=ROWS, cache_tokens=10**6)
        super().__init__(first_token_s=0.05, token_s=0.01, limits=limits)
        self.gate = threading.Event()
        self.gate.set()
        self.asked: list[Request] = []

    def submit(self, task: Task, sink: EventSink) -> None:
        self.asked.append(task.request)

        def hear(event: Event) -> None:
            self.gate.wait(LIMIT_S)
            sink(event)

        super().submit(task, hear)


def add_project(keys: Keys, ledger: Ledger, name: str) -> str:
    keys.add_project(name)
    _, key = keys.add_key(name, max_concurrent=NUM_CLIENTS)
    ledger.grant(ledger.open_allocation(name, "*"), 10**12)
    return key


async def ask(client: httpx.AsyncClient, kind: str, key: str) -> Reply:
    """Ask for eight tokens as a client of some kind would."""
    tier = kind if kind in ("interactive", "batch") else "standard"
    body = {
        "model": "fixed",
        "prompt": MODEST if kind == "modest" else "one two",
        "max_tokens": 8,
        "stream": kind == "stream",
        "fabric": {"tier": tier, "deadline_s": 600},
    }
    headers = {"authorization": f"Bearer {key}"}
    async with client.stream("POST", "/v1/completions", json=body, headers=headers) as reply:
        if kind == "leaves":
            await asyncio.sleep(0)
            return Reply(kind, reply.status_code, None, None, True)
        text = (await reply.aread()).decode()
    if reply.status_code != 200:
        error = json.loads(text)["error"]
        return Reply(kind, reply.status_code, error, reply.headers.get("retry-after"), True)
    if kind == "stream":
        return Reply(kind, 200, None, None, text.rstrip().endswith("[DONE]"))
    return Reply(kind, 200, None, None, json.loads(text)["usage"]["completion_tokens"] == 8)


async def ask_all(
    hub: RunningHub, gate: threading.Event, kinds: Sequence[str], greedy: str, modest: str
) -> list[Reply]:
    """Ask for all at once; the gate opens when the modest project's, the last, are in line."""
    limits = httpx.Limits(max_connections=None)
    async with (
        asyncio.timeout(LIMIT_S),
        httpx.AsyncClient(base_url=hub.base_url, limits=limits, timeout=LIMIT_S) as client,
    ):
        many = [asyncio.create_task(ask(client, kind, greedy)) for kind in kinds]
        few = [asyncio.create_task(ask(client, "modest", modest)) for _ in range(NUM_MODEST)]
        while not gate.is_set():
            await asyncio.sleep(0.1)
            in_line = {one.project: one.num_waiting for one in hub.broker.tiers.waiting()}
            if in_line.get("modest") == NUM_MODEST:
                gate.set()
        return await asyncio.gather(*many, *few)


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_thousand_clients_are_answered_or_refused_and_nobody_hangs(tmp_path: Path) -> None:
    kinds = [
        ("interactive", "standard", "stream", "batch", "leaves")[number % 5]
        for number in range(NUM_CLIENTS - NUM_MODEST)
    ]
    engine, patient = GatedEngine(), BrokerSettings(first_token_timeout_s=LIMIT_S)
    with running_hub(tmp_path, sites=("alpha",), engine=lambda: engine, broker=patient) as hub:
        greedy, modest = (add_project(hub.keys, hub.ledger, one) for one in ("greedy", "modest"))
        process = psutil.Process(os.getpid())
        asyncio.run(ask_all(hub, engine.gate, ["standard"] * 40, greedy, modest))
        before_bytes = process.memory_info().rss
        engine.gate.clear()
        engine.asked.clear()
        replies = asyncio.run(ask_all(hub, engine.gate, kinds, greedy, modest))
        grown_bytes = process.memory_info().rss - before_bytes
        assert len(replies) == NUM_CLIENTS
        assert {reply.status for reply in replies} <= {200, 429, 503}
        assert all(reply.whole for reply in replies)
        refused = [reply for reply in replies if reply.error is not None]
        assert {str(reply.error and reply.error["code"]) for reply in refused} <= {
            "overloaded",
            "tier_not_held",
        }
        for reply in refused:
            assert reply.error is not None
            assert (reply.retry_after is not None) == (reply.error["code"] == "overloaded")
        answered = Counter(reply.kind for reply in replies if reply.status == 200)
        # Who has time is answered; who has none is told so at once, if it would be late.
        assert answered["standard"] == answered["stream"] == kinds.count("standard")
        assert answered["batch"] == kinds.count("batch")
        assert answered["modest"] == NUM_MODEST
        # The line took one of each project in turns: the many of one did not make the few wait.
        turns = [request for request in engine.asked if request.tier == "standard"]
        modest_turns = [n for n, one in enumerate(turns) if one.input == TextInput(text=MODEST)]
        assert max(modest_turns) < len(turns) // 2
        assert grown_bytes < MAX_GROWTH_BYTES
        # Nothing is left of them.
        wait_until(lambda: not hub.broker.tiers.waiting(), timeout_s=60)
        wait_until(
            lambda: all(not view.num_in_flight for view in hub.broker.replicas()), timeout_s=60
        )
        wait_until(
            lambda: (
                not any(
                    one.held_usu
                    for name in ("greedy", "modest")
                    for one in hub.ledger.allocations(name)
                )
            ),
            timeout_s=60,
        )
        hub.ledger.verify()
