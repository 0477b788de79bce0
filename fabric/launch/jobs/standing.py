"""What the account has left that pays for a launch: asked of the centre now and then, told the hub.

Nothing waits for the centre: its commands may take a minute, and the launch's jobs must be watched.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from datetime import datetime, timedelta

from fabric.errors import FabricError
from fabric.launch.jobs.hub import InstanceHub
from fabric.launch.jobs.means import AskBalance, Means, get_means
from fabric.launch.jobs.order import Order
from fabric.launch.jobs.plan import LaunchPlan
from fabric.launch.jobs.records import JobRecord

ASK_S = 600.0
"""A centre's accounting is asked at most so often."""

logger = logging.getLogger(__name__)


class Standing:
    """Tells the hub what the account of one launch has left.

    Args:
        hub: Who is told.
        ask: Asks the centre; called in a thread of its own.
        monotonic: Seconds that only grow.
    """

    def __init__(
        self,
        hub: InstanceHub,
        ask: AskBalance,
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._hub = hub
        self._ask = ask
        self._monotonic = monotonic
        self._due_at = float("-inf")
        self._asked: Future[Means] | None = None
        self._complaint = ""

    @property
    def is_asking(self) -> bool:
        """Whether the centre was asked and its answer has not been taken."""
        return self._asked is not None

    def look(self, plan: LaunchPlan, jobs: Sequence[JobRecord], now: datetime) -> None:
        """Ask if it is time, and tell what was answered. Never waits for the centre.

        Args:
            plan: Of the launch.
            jobs: All its jobs.
            now: The time.
        """
        instance = next((job.instance for job in jobs if job.open), None)
        if instance is None:
            return
        if self._asked is None:
            if self._monotonic() >= self._due_at:
                self._due_at = self._monotonic() + ASK_S
                self._asked = _in_thread(get_means, plan, self._ask)
        elif self._asked.done():
            asked, self._asked = self._asked, None
            self._take(asked, instance, _needed(plan, jobs, now))

    def _take(self, asked: Future[Means], instance: str, needed: float | None) -> None:
        if (fault := asked.exception()) is not None:
            self._complain(f"{type(fault).__name__}: {fault}")
            return
        means = asked.result()
        if means.failed:
            self._complain(means.unknown)
        if means.balance is None:
            return
        try:
            self._hub.report_balance(
                instance,
                {
                    "account": means.account,
                    "unit": means.balance.unit,
                    "available": float(means.balance.available),
                    "needed": None if means.unknown else needed,
                },
            )
        except FabricError as error:
            logger.info("the hub was not told what the account has left: %s", error.message)

    def _complain(self, reason: str) -> None:
        if reason != self._complaint:
            self._complaint = reason
            logger.warning("it is not known what the account has left: %s", reason)


def _needed(plan: LaunchPlan, jobs: Sequence[JobRecord], now: datetime) -> float | None:
    """Return what a launch's jobs may still take, in the machine's unit, if that is known."""
    if plan.charge is None:
        return None
    order = plan.order
    last = [_last(order, jobs, replica, now) for replica in range(order.replicas)]
    left_s = sum((at - now).total_seconds() for at in last)
    return plan.charge * max(0.0, left_s) / order.walltime_s


def _last(order: Order, jobs: Sequence[JobRecord], replica: int, now: datetime) -> datetime:
    """Return when the last job of a replica should end."""
    mine = [job for job in jobs if job.open and job.replica == replica]
    ends = [job.deadline_at or now + timedelta(seconds=order.walltime_s) for job in mine]
    return max([now, *ends, *([order.keep_until] if order.keep_until else [])])


def _in_thread(act: Callable[..., Means], *args: object) -> Future[Means]:
    """Return what a call will give, made in a thread that keeps no process alive."""
    future: Future[Means] = Future()

    def run() -> None:
        try:
            future.set_result(act(*args))
        except Exception as fault:
            future.set_exception(fault)

    threading.Thread(target=run, name="balance", daemon=True).start()
    return future
