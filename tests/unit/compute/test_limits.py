"""The budget against the service's own rule: no window holds more than it allows."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from fabric.compute import RequestBudget, ServiceLimits
from fabric.errors import ServiceUnreachable

WINDOW_S = 0.3


def get_budget(max_requests: int = 5, window_s: float = WINDOW_S) -> RequestBudget:
    return RequestBudget(ServiceLimits(max_requests=max_requests, window_s=window_s, margin_s=0.1))


def test_no_window_ever_holds_more_than_is_allowed() -> None:
    budget = get_budget()
    sent_at: list[float] = []

    def send(_: int) -> None:
        budget.acquire()
        sent_at.append(time.monotonic())

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(send, range(23)))
    sent_at.sort()
    assert budget.num_requests == 23
    for first, sixth in zip(sent_at, sent_at[5:], strict=False):
        assert sixth - first >= WINDOW_S


def test_pause_holds_everything_back() -> None:
    budget = get_budget(max_requests=100)
    budget.acquire()
    budget.pause(0.3)
    began_at = time.monotonic()
    budget.acquire()
    assert time.monotonic() - began_at >= 0.29


def test_shorter_pause_does_not_end_a_longer_one() -> None:
    budget = get_budget(max_requests=100)
    began_at = time.monotonic()
    budget.pause(0.3)
    budget.pause(0.01)
    budget.acquire()
    assert time.monotonic() - began_at >= 0.29


def test_close_ends_every_wait() -> None:
    budget = get_budget(max_requests=1, window_s=3600)
    budget.acquire()
    errors: list[Exception] = []

    def wait() -> None:
        try:
            budget.acquire()
        except ServiceUnreachable as error:
            errors.append(error)

    threads = [threading.Thread(target=wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    budget.close()
    for thread in threads:
        thread.join(30)
    assert len(errors) == 3
    with pytest.raises(ServiceUnreachable):
        budget.acquire()
