from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from fabric.sql import Database, Offload
from fabric.sql import offload as offload_module


@pytest.fixture
async def offload(tmp_path: object) -> AsyncIterator[Offload]:
    # What is offloaded here needs no database.
    made = Offload(Database(f"sqlite:///{tmp_path}/unused.db"))
    yield made
    made.close()


async def test_calls_run_on_one_other_thread_in_order(offload: Offload) -> None:
    seen: list[tuple[int, int]] = []
    calls = [
        offload(lambda number=number: seen.append((number, threading.get_ident())))
        for number in range(20)
    ]
    await asyncio.gather(*calls)
    assert [number for number, _ in seen] == list(range(20))
    threads = {thread for _, thread in seen}
    assert len(threads) == 1
    assert threading.get_ident() not in threads


async def test_urgent_calls_overtake_those_that_wait(offload: Offload) -> None:
    gate, seen = threading.Event(), []
    busy = offload(gate.wait)
    late = offload(seen.append, "regular")
    urgent = offload.urgent(seen.append, "urgent")
    gate.set()
    await asyncio.gather(busy, late, urgent)
    assert seen == ["urgent", "regular"]


async def test_errors_reach_the_caller(offload: Offload) -> None:
    with pytest.raises(ZeroDivisionError):
        await offload(divmod, 1, 0)
    assert await offload(divmod, 7, 2) == (3, 1)


async def test_a_queued_call_runs_though_its_caller_left(offload: Offload) -> None:
    gate, seen = threading.Event(), []
    busy = offload(gate.wait)
    call = asyncio.ensure_future(offload(seen.append, "written"))
    await asyncio.sleep(0)
    call.cancel()
    gate.set()
    await busy
    await offload(lambda: None)
    assert seen == ["written"]


async def test_closing_finishes_what_was_called_and_takes_no_more(offload: Offload) -> None:
    gate, seen = threading.Event(), []
    calls = [offload(gate.wait), offload(seen.append, 1), offload(seen.append, 2)]
    gate.set()
    await asyncio.to_thread(offload.close)
    assert seen == [1, 2]
    await asyncio.gather(*calls)
    with pytest.raises(RuntimeError, match="ended"):
        offload(seen.append, 3)


async def test_the_log_is_kept_short_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload_module, "CHECKPOINT_S", 0.01)
    path = tmp_path / "fabric.db"
    with Database(f"sqlite:///{path}") as database:
        async with Offload(database).checkpointing():
            with database.transaction() as connection:
                connection.exec_driver_sql("CREATE TABLE numbers (number INTEGER)")
            for _ in range(3000):
                if b"numbers" in path.read_bytes():
                    break
                await asyncio.sleep(0.01)
        assert b"numbers" in path.read_bytes()


async def test_what_is_posted_runs_in_its_turn_and_its_error_stops_nothing(
    offload: Offload, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[str] = []
    before = offload(seen.append, "before")
    offload.post(seen.append, "posted")
    offload.post(lambda: seen.append(str(1 // 0)))
    await offload(seen.append, "after")
    await before
    assert seen == ["before", "posted", "after"]
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("pages_per_s", [0, 700, 100_000])
def test_the_log_is_copied_when_there_is_much_of_it(pages_per_s: int) -> None:
    pause_s = offload_module.CHECKPOINT_S
    for _ in range(10):
        pause_s = offload_module.next_pause_s(pause_s, int(pages_per_s * pause_s))
    wanted_s = offload_module.LOG_PAGES / max(1, pages_per_s)
    least_s, most_s = offload_module.CHECKPOINT_S, offload_module.MAX_CHECKPOINT_S
    assert pause_s == pytest.approx(min(most_s, max(least_s, wanted_s)), rel=0.01)
