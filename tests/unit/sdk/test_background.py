"""Coroutines run for threads that block, whenever those threads are interrupted."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from fabric.sdk.background import BackgroundLoop


async def _do_nothing() -> None:
    return None


def test_interrupt_while_handing_over_cancels_on_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    ended_by: list[type[BaseException]] = []
    suspended = threading.Event()

    async def work() -> None:
        suspended.set()
        try:
            await asyncio.Event().wait()
        except BaseException as error:
            asyncio.get_running_loop()
            ended_by.append(type(error))
            raise

    hand_over = asyncio.run_coroutine_threadsafe

    def interrupted(*args: Any) -> None:
        hand_over(*args)
        assert suspended.wait(20)
        raise KeyboardInterrupt

    background = BackgroundLoop(on_close=_do_nothing)
    monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        background.run(work())
    background.close()
    assert ended_by == [asyncio.CancelledError]


def test_closed_client_says_so() -> None:
    background = BackgroundLoop(on_close=_do_nothing)
    background.close()
    with pytest.raises(RuntimeError, match="closed"):
        background.run(_do_nothing())
