"""A compute channel to a real instance behind a real endpoint, and what may go wrong between."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from fabric.compute import ServiceLimits
from fabric.dispatch.relay import RelayChannel, RelayFigures
from fabric.errors import SessionLost
from fabric.messages import (
    Event,
    Failed,
    Finished,
    Request,
    Sampling,
    Task,
    TextInput,
    Token,
)
from fabric.testing.compute import TASK_ENVIRON, ComputeSite, get_rig_pool
from fabric.testing.globus import Endpoint, Globus, PublishedLimits, running_globus
from fabric.testing.patience import within

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

FIGURES = RelayFigures(
    max_batches=2,
    max_tasks=64,
    poll_s=1.0,
    idle_poll_s=1.0,
    poll_timeout_s=8.0,
    delivery_s=8.0,
    grace_s=30.0,
)
HEARTBEAT_DEADLINE_S = 3 * (FIGURES.poll_s + FIGURES.poll_timeout_s) + FIGURES.delivery_s
SLACK_S = 30.0
CONFIG = {"engine": "threads", "workers": 4}


@pytest.fixture(scope="module")
def globus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Globus]:
    directory = tmp_path_factory.mktemp("rig")
    with running_globus(directory, limits=PublishedLimits(requests=200)) as globus:
        yield globus


@pytest.fixture
def endpoint(globus: Globus) -> Iterator[Endpoint]:
    with globus.endpoint("channel", owner="hub", task_environ=TASK_ENVIRON) as endpoint:
        yield endpoint


@pytest.fixture
def site(globus: Globus, endpoint: Endpoint, tmp_path: Path) -> Iterator[ComputeSite]:
    with get_rig_pool(globus, "hub", ServiceLimits(max_requests=100)) as pool:
        yield ComputeSite.get(pool, endpoint, tmp_path / "site", CONFIG)


@asynccontextmanager
async def open_channel(
    site: ComputeSite, engine: str, figures: RelayFigures = FIGURES
) -> AsyncIterator[RelayChannel]:
    with site.instance(engine) as instance:
        channel = await RelayChannel.open(site.get_relay(instance, figures))
        try:
            yield channel
        finally:
            await channel.close()


def make_task(channel: RelayChannel, number: int, *, max_tokens: int = 5, attempt: int = 1) -> Task:
    request = Request(
        id=f"run_{number}",
        model="fixed",
        input=TextInput(text="three words long"),
        sampling=Sampling(max_tokens=max_tokens, temperature=0.0),
    )
    return Task(
        id=request.id,
        attempt=attempt,
        request=request,
        digest=channel.hello.digest,
        deadline_s=120.0,
    )


async def collect(channel: RelayChannel, task: Task) -> list[Event]:
    return [event async for event in channel.run(task)]


def words(events: list[Event]) -> list[str]:
    return [event.text.strip() for event in events if isinstance(event, Token)]


async def wait_busy(channel: RelayChannel) -> None:
    async with asyncio.timeout(30):
        while not channel.load.num_running:  # noqa: ASYNC110 - channels are polled
            await asyncio.sleep(0.05)


async def test_killed_user_endpoint_loses_its_tasks_and_a_new_attempt_succeeds(
    endpoint, site
) -> None:
    async with open_channel(site, "token_s=0.1") as channel:
        runs = [
            asyncio.create_task(collect(channel, make_task(channel, number, max_tokens=900)))
            for number in range(2)
        ]
        await wait_busy(channel)
        endpoint.kill_user_endpoints()
        outcomes = await within(
            asyncio.gather(*runs, return_exceptions=True), HEARTBEAT_DEADLINE_S + SLACK_S
        )
        assert [type(outcome) for outcome in outcomes] == [SessionLost, SessionLost]
    async with open_channel(site, "") as again:
        events = await collect(again, make_task(again, 0, attempt=2))
        assert words(events) == [f"word{number}" for number in range(5)]
        assert {event.attempt for event in events} == {2}


async def test_service_away_for_a_while_costs_no_task(globus, site) -> None:
    async with open_channel(site, "token_s=0.1") as channel:
        long = asyncio.create_task(collect(channel, make_task(channel, 1, max_tokens=80)))
        await wait_busy(channel)
        await asyncio.to_thread(globus.stop_service)
        short = asyncio.create_task(collect(channel, make_task(channel, 2)))
        try:
            done, _ = await asyncio.wait([long, short], timeout=12)
            assert not done
        finally:
            await asyncio.to_thread(globus.start_service)
        assert len(words(await within(long, 60))) == 80
        assert len(words(await within(short, 60))) == 5


async def test_broker_restarted_with_tasks_under_way_costs_no_task(globus, site) -> None:
    # Agent and SDK reconnect after pauses of their own choosing, up to ten seconds each.
    patient = replace(FIGURES, poll_timeout_s=40.0)
    async with open_channel(site, "token_s=0.1", patient) as channel:
        run = asyncio.create_task(collect(channel, make_task(channel, 1, max_tokens=60)))
        await wait_busy(channel)
        await asyncio.to_thread(globus.restart_broker)
        assert len(words(await within(run, 120))) == 60


async def test_answers_too_large_together_come_one_by_one(site) -> None:
    async with open_channel(site, "context_tokens=40000") as channel:
        tasks = [make_task(channel, number, max_tokens=13_000) for number in range(3)]
        runs = [asyncio.create_task(collect(channel, task)) for task in tasks]
        for events in await within(asyncio.gather(*runs), 120):
            assert isinstance(events[-1], Finished)
            assert len(words(events)) == 13_000


async def test_answer_too_large_for_the_service_says_so(site) -> None:
    async with open_channel(site, "context_tokens=200000") as channel:
        task = make_task(channel, 1, max_tokens=100_000)
        events = await within(collect(channel, task), 120)
        assert isinstance(events[-1], Failed)
        assert events[-1].failure.code == "payload_too_large"
        assert "5000000" in events[-1].failure.message


async def test_many_requests_need_few_submits(globus, site) -> None:
    async with open_channel(site, "") as channel:
        before = site.pool.budget.num_requests
        runs = [collect(channel, make_task(channel, number)) for number in range(300)]
        for events in await within(asyncio.gather(*runs), 120):
            assert len(words(events)) == 5
        assert site.pool.budget.num_requests - before < 30
