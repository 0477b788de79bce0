"""Futures: order, bounds, cancellation before and while a request runs."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, as_completed
from http.server import BaseHTTPRequestHandler

import pytest

from fabric.errors import UnknownModel
from fabric.sdk import Fabric
from fabric.testing.scripted_hub import (
    ScriptedHub,
    completion,
    refusal,
    wait_for_client_to_leave,
)


def echo(hub: ScriptedHub) -> Callable[[BaseHTTPRequestHandler], None]:
    return lambda handler: completion(handler.server.bodies[-1]["prompt"])(handler)  # type: ignore[attr-defined]


def test_submitted_requests_all_come_back(hub: ScriptedHub, fabric: Fabric) -> None:
    hub.play(completion())
    futures = [fabric.submit("x", model="toy") for _ in range(40)]
    assert {future.result().text for future in as_completed(futures, timeout=20)} == {"four"}
    assert len(hub.paths) == 40


def test_no_more_than_the_bound_are_on_their_way(hub: ScriptedHub) -> None:
    now, most, lock = 0, 0, threading.Lock()
    release = threading.Event()

    def count(handler: BaseHTTPRequestHandler) -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
            if now == 3:
                release.set()
        release.wait(20)
        with lock:
            now -= 1
        completion()(handler)

    hub.play(count)
    with Fabric(hub.url, "sk", num_parallel=3) as fabric:
        for future in [fabric.submit("x", model="toy") for _ in range(12)]:
            future.result(20)
    assert most == 3


def test_cancelling_a_running_request_closes_its_connection(
    hub: ScriptedHub, fabric: Fabric
) -> None:
    started = threading.Event()

    def hold(handler: BaseHTTPRequestHandler) -> None:
        started.set()
        wait_for_client_to_leave(handler)

    hub.play(hold)
    future = fabric.submit("x", model="toy")
    assert started.wait(20)
    assert future.cancel()
    assert hub.client_left.wait(20)
    with pytest.raises(CancelledError):
        future.result()


def test_a_request_cancelled_in_the_queue_is_never_sent(hub: ScriptedHub) -> None:
    release = threading.Event()

    def hold(handler: BaseHTTPRequestHandler) -> None:
        release.wait(20)
        completion()(handler)

    hub.play(hold)
    with Fabric(hub.url, "sk", num_parallel=1) as fabric:
        first = fabric.submit("first", model="toy")
        second = fabric.submit("second", model="toy")
        assert second.cancel()
        release.set()
        first.result(20)
        fabric.submit("third", model="toy").result(20)
    assert [body["prompt"] for body in hub.bodies] == ["first", "third"]


def test_closing_the_client_cancels_what_runs(hub: ScriptedHub) -> None:
    hub.play(wait_for_client_to_leave)
    with Fabric(hub.url, "sk") as fabric:
        future = fabric.submit("x", model="toy")
    assert future.cancelled()


def test_map_keeps_the_order_and_takes_prompts_as_it_needs_them(hub: ScriptedHub) -> None:
    hub.play(completion())
    taken = itertools.count()
    endless = (f"prompt {index}" for index in taken)
    with Fabric(hub.url, "sk", num_parallel=4) as fabric:
        answers = fabric.map(endless, model="toy")
        assert [next(answers).text for _ in range(6)] == ["four"] * 6
        answers.close()  # type: ignore[attr-defined]
    assert next(taken) <= 6 + 4


def test_map_raises_at_the_prompt_that_failed(hub: ScriptedHub) -> None:
    hub.play(completion(), refusal("model_not_found", "There is none.", 404), completion())
    with Fabric(hub.url, "sk", num_parallel=1) as fabric:
        answers = fabric.map(["a", "b", "c"], model="toy")
        assert next(answers).text == "four"
        with pytest.raises(UnknownModel):
            next(answers)
