"""The budget against the service's own rule: no window holds more than it allows."""

import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fabric.compute import RequestBudget, ServiceLimits
from fabric.errors import ServiceUnreachable, SettingInvalid

WINDOW_S = 0.3

SENDER = """
import sys, time
from pathlib import Path
from fabric.compute import RequestBudget, ServiceLimits

limits = ServiceLimits(max_requests=5, window_s=0.3, margin_s=0.1)
budget = RequestBudget(limits, Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for _ in range(12):
    budget.acquire()
    print(time.time(), flush=True)
"""


def get_budget(
    max_requests: int = 5, window_s: float = WINDOW_S, shared: Path | None = None
) -> RequestBudget:
    limits = ServiceLimits(max_requests=max_requests, window_s=window_s, margin_s=0.1)
    return RequestBudget(limits, shared)


def check_windows(sent_at: Sequence[float]) -> None:
    """Of any six requests, the last came a window after the first."""
    in_order = sorted(sent_at)
    for first, sixth in zip(in_order, in_order[5:], strict=False):
        assert sixth - first >= WINDOW_S


def test_no_window_ever_holds_more_than_is_allowed() -> None:
    budget = get_budget()
    sent_at: list[float] = []

    def send(_: int) -> None:
        budget.acquire()
        sent_at.append(time.monotonic())

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(send, range(23)))
    assert budget.num_requests == 23
    check_windows(sent_at)


def test_two_processes_at_once_have_one_budget(tmp_path: Path) -> None:
    senders = [
        subprocess.Popen(
            [sys.executable, "-c", SENDER, str(tmp_path / "requests.json")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for sender in senders:
        assert sender.stdout is not None
        assert sender.stdout.readline() == "ready\n"
    for sender in senders:
        assert sender.stdin is not None
        sender.stdin.write("\n")
        sender.stdin.flush()
    told = [sender.communicate(timeout=60)[0].split() for sender in senders]
    assert [len(one) for one in told] == [12, 12]
    assert [sender.returncode for sender in senders] == [0, 0]
    check_windows([float(at) for one in told for at in one])


def test_a_pause_holds_back_who_shares_the_budget(tmp_path: Path) -> None:
    told, other = (get_budget(shared=tmp_path / "requests.json") for _ in range(2))
    began_at = time.time()
    told.pause(0.3)
    other.acquire()
    assert time.time() - began_at >= 0.29


@pytest.mark.parametrize(
    "left",
    [
        "",
        '{"sent_at": [1.0',
        '{"sent_at": [NaN]}',
        "[]",
        f'{{"sent_at": {[9e9] * 5}}}',
        '{"paused_until": 9e9}',
    ],
    ids=["empty", "cut off", "no number", "a list", "clock set back", "paused for years"],
)
def test_a_file_that_makes_no_sense_holds_nobody_back(tmp_path: Path, left: str) -> None:
    (tmp_path / "requests.json").write_text(left)
    budget = get_budget(max_requests=1, window_s=3600, shared=tmp_path / "requests.json")
    asking = threading.Thread(target=budget.acquire, daemon=True)
    asking.start()
    asking.join(20)
    assert not asking.is_alive()
    assert '"sent_at":[' in (tmp_path / "requests.json").read_text()


def test_a_file_that_cannot_be_written_is_a_typed_error(tmp_path: Path) -> None:
    budget = get_budget(shared=tmp_path / "missing" / "requests.json")
    budget.pause(1)
    with pytest.raises(SettingInvalid, match=r"missing/requests\.json.*No such file"):
        budget.acquire()


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
        thread.join(10)
    assert len(errors) == 3
    with pytest.raises(ServiceUnreachable):
        budget.acquire()
