"""What an instance asks and tells the hub about raw calls, whatever becomes of its session."""

from __future__ import annotations

import asyncio

import pytest

from fabric.errors import (
    Duplicate,
    HubNotConnected,
    InsufficientBalance,
    RequestCancelled,
    TicketInvalid,
)
from fabric.instance.meter import Meter
from fabric.messages import (
    Event,
    Failed,
    Failure,
    Finished,
    Metered,
    Redeem,
    Redeemed,
    Request,
    Sampling,
    Settled,
    Task,
    TextInput,
    Token,
    Usage,
)

USAGE = Usage(prompt_tokens=3, output_tokens=1)


class Hub:
    """The hub's end of one session."""

    def __init__(self, meter: Meter) -> None:
        self.said: list[Redeem | Metered] = []
        self.meter = meter
        self._post = self.said.append
        meter.connect(self._post)

    def leave(self) -> None:
        self.meter.disconnect(self._post)

    def admit(self, task: Task, refusal: Failure | None = None) -> None:
        self.meter.take(Redeemed(task_id=task.id, attempt=1, failure=refusal))

    def settle(self, task: Task) -> None:
        self.meter.take(Settled(task_id=task.id, attempt=1))

    def reports(self) -> list[Metered]:
        return [frame for frame in self.said if isinstance(frame, Metered)]


def make_task(number: int = 1) -> Task:
    request = Request(
        id=f"run_{number}",
        model="fixed",
        input=TextInput(text="hello"),
        sampling=Sampling(max_tokens=5),
    )
    return Task(
        id=request.id,
        attempt=1,
        request=request,
        digest="sha256:0",
        deadline_s=60,
        ticket="fabt_secret",
    )


def events(task: Task, *, failure: Failure | None = None) -> list[Event]:
    key = {"task_id": task.id, "attempt": 1}
    token = Token(**key, choice=0, position=0, token_id=1, text="a")
    if failure is not None:
        return [token, Failed(**key, failure=failure, usage=USAGE)]
    return [token, Finished(**key, finish_reasons=("stop",), usage=USAGE)]


async def asking(meter: Meter, task: Task) -> asyncio.Task[None]:
    """Return a redemption that has been asked for."""
    redeeming = asyncio.create_task(meter.redeem(task))
    await asyncio.sleep(0)
    return redeeming


async def run(meter: Meter, task: Task, failure: Failure | None = None) -> None:
    """Run an admitted task on another thread, as an engine does."""
    sink = meter.metered(task, lambda _: None)
    for event in events(task, failure=failure):
        await asyncio.to_thread(sink, event)
    await asyncio.sleep(0)


async def test_a_task_is_asked_for_reported_and_then_forgotten() -> None:
    meter, task = Meter("inst"), make_task()
    hub = Hub(meter)
    redeeming = await asking(meter, task)
    assert not meter.idle.is_set()
    assert hub.said == [
        Redeem(task_id=task.id, attempt=1, ticket="fabt_secret", request=task.request)
    ]
    hub.admit(task)
    await redeeming
    await run(meter, task)
    (report,) = hub.reports()
    assert (report.usage, report.failure_code) == (USAGE, None)
    assert report.first_token_s is not None
    assert report.first_token_s <= report.total_s
    assert not meter.idle.is_set()
    hub.settle(task)
    assert meter.idle.is_set()


async def test_a_failed_task_is_reported_with_what_it_consumed() -> None:
    meter, task = Meter("inst"), make_task()
    hub = Hub(meter)
    redeeming = await asking(meter, task)
    hub.admit(task)
    await redeeming
    await run(meter, task, Failure.of(RequestCancelled()))
    (report,) = hub.reports()
    assert (report.usage, report.failure_code) == (USAGE, "request_cancelled")


async def test_a_refusal_is_raised_and_nothing_reported() -> None:
    meter, task = Meter("inst"), make_task()
    hub = Hub(meter)
    redeeming = await asking(meter, task)
    refusal = InsufficientBalance(account="allocation:x:*", needed_usu=2, available_usu=1)
    hub.admit(task, Failure.of(refusal))
    with pytest.raises(InsufficientBalance, match="2"):
        await redeeming
    assert hub.reports() == []
    assert meter.idle.is_set()


async def test_without_a_session_nothing_is_asked() -> None:
    meter = Meter("inst")
    with pytest.raises(HubNotConnected, match="'inst'"):
        await meter.redeem(make_task())
    Hub(meter).leave()
    with pytest.raises(HubNotConnected):
        await meter.redeem(make_task())
    assert meter.idle.is_set()


async def test_a_session_that_ends_in_the_question_gives_back_what_it_may_have_held() -> None:
    meter, task = Meter("inst"), make_task()
    hub = Hub(meter)
    redeeming = await asking(meter, task)
    hub.leave()
    with pytest.raises(HubNotConnected, match="while it asked"):
        await redeeming
    (report,) = Hub(meter).reports()
    assert (report.usage, report.failure_code) == (Usage(), "hub_not_connected")


async def test_a_report_is_repeated_on_every_session_until_it_is_settled() -> None:
    meter, task = Meter("inst"), make_task()
    first = Hub(meter)
    redeeming = await asking(meter, task)
    first.admit(task)
    await redeeming
    first.leave()
    await run(meter, task)
    assert first.reports() == []
    second, third = Hub(meter), Hub(meter)
    second.leave()  # an older session's end does not end a newer one
    meter.remind()
    assert len(second.reports()) == len(third.reports()) == 1
    meter.remind(older_than_s=0.0)
    assert len(third.reports()) == 2
    third.settle(task)
    assert Hub(meter).said == []


async def test_a_task_nobody_waits_for_is_given_back() -> None:
    meter, task = Meter("inst"), make_task()
    hub = Hub(meter)
    redeeming = await asking(meter, task)
    redeeming.cancel()
    with pytest.raises(asyncio.CancelledError):
        await redeeming
    # The hub may take this for a run it does not know; what it admits later goes back too.
    hub.settle(task)
    hub.admit(task)
    assert [(one.usage, one.failure_code) for one in hub.reports()] == [
        (Usage(), "request_cancelled")
    ] * 2
    hub.settle(task)
    hub.admit(task, Failure.of(TicketInvalid()))
    assert len(hub.reports()) == 2
    assert meter.idle.is_set()


async def test_one_id_runs_once_at_a_time() -> None:
    meter, task = Meter("inst"), make_task()
    hub = Hub(meter)
    redeeming = await asking(meter, task)
    with pytest.raises(Duplicate, match="run_1"):
        await meter.redeem(task)
    hub.admit(task)
    await redeeming
    with pytest.raises(Duplicate, match="run_1"):
        await meter.redeem(task)
    other = await asking(meter, make_task(2))
    hub.admit(make_task(2))
    await other


async def test_a_ticket_is_not_shown() -> None:
    task = make_task()
    frame = Redeem(task_id="run_1", attempt=1, ticket="fabt_secret", request=task.request)
    assert "fabt_secret" not in repr(task) + repr(frame) + str(task) + str(frame)
