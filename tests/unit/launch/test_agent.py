"""A site's agent, as the process it is, in front of a hub that only knows launches."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from fabric.config import SiteModel, SiteSpec
from fabric.dispatch.session import ConnectionLost, SessionChannel
from fabric.launch.agent import USUAL_START_S, AgentSpec
from fabric.messages import (
    Finished,
    Launch,
    Request,
    Sampling,
    Task,
    TextInput,
    new_id,
)
from fabric.testing.instance import MODULE
from fabric.testing.processes import guarded_by, wait_ended

pytestmark = pytest.mark.slow

COMES_UP_S = 60.0


class StarletteConnection:
    def __init__(self, websocket: WebSocket) -> None:
        self._websocket = websocket

    async def send(self, text: str) -> None:
        try:
            await self._websocket.send_text(text)
        except (WebSocketDisconnect, RuntimeError) as error:
            raise ConnectionLost(str(error)) from error

    async def receive(self) -> str:
        try:
            return await self._websocket.receive_text()
        except (WebSocketDisconnect, RuntimeError) as error:
            raise ConnectionLost(str(error) or "disconnected") from error

    async def close(self, code: int = 1000, reason: str = "") -> None:
        try:
            await self._websocket.close(code, reason)
        except RuntimeError:
            return


class LaunchHub:
    """Answers launches with instances of one source, and keeps what agents report."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.source = "fixed-delay:token_s=0.02"
        self.reports: list[tuple[str, str]] = []
        self.ended: list[dict[str, str]] = []
        self.expected: list[tuple[str, float]] = []
        self.launches: list[dict[str, str]] = []
        self.channels: asyncio.Queue[SessionChannel] = asyncio.Queue()
        self.app = Starlette(
            routes=[
                Route("/v1/fabric/launches", self._launch, methods=["POST"]),
                Route("/v1/fabric/launches/{instance}/end", self._end, methods=["POST"]),
                Route("/v1/fabric/launches/{instance}/outlook", self._expect, methods=["POST"]),
                Route("/v1/fabric/sites/{site}/status", self._report, methods=["POST"]),
                WebSocketRoute("/v1/fabric/session", self._session),
            ]
        )

    async def accept(self) -> SessionChannel:
        async with asyncio.timeout(COMES_UP_S):
            return await self.channels.get()

    async def _launch(self, request: HttpRequest) -> Response:
        if request.headers["Authorization"] != "Bearer site-token":
            return JSONResponse({"error": {"message": "no such key"}}, status_code=401)
        body = await request.json()
        self.launches.append(body)
        launch = Launch(
            instance=new_id("instance"),
            site=body["site"],
            model=body["model"],
            source=self.source,
            digest=None,
            token="launch-token",
        )
        return Response(launch.model_dump_json(), media_type="application/json")

    async def _end(self, request: HttpRequest) -> Response:
        self.ended.append({**request.path_params, **await request.json()})
        return Response(status_code=204)

    async def _expect(self, request: HttpRequest) -> Response:
        body = await request.json()
        self.expected.append((request.path_params["instance"], body["ready_in_s"]))
        return Response(status_code=204)

    async def _report(self, request: HttpRequest) -> Response:
        body = await request.json()
        self.reports.append((body["state"], body["detail"]))
        return Response(status_code=204)

    async def _session(self, websocket: WebSocket) -> None:
        assert websocket.headers["Authorization"] == "Bearer launch-token"
        await websocket.accept()
        channel = await SessionChannel.open(StarletteConnection(websocket), heartbeat_s=0.2)
        await channel.welcome()
        self.channels.put_nowait(channel)
        await channel.wait_closed()
        await channel.close()


@pytest.fixture
async def hub(free_port: int) -> AsyncIterator[LaunchHub]:
    hub = LaunchHub(free_port)
    config = uvicorn.Config(hub.app, port=free_port, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server._serve())
    while not server.started:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    yield hub
    server.should_exit = True
    await serving


@contextmanager
def start_agent(state_dir: Path, hub_url: str, token: str = "site-token") -> Iterator:
    site = SiteSpec(
        name="alpha", models=(SiteModel(name="fixed", source="unused", context_tokens=2048),)
    )
    spec = AgentSpec(
        site=site, hub_url=hub_url, token=token, state_dir=state_dir, instance_module=MODULE
    )
    with subprocess.Popen(
        [sys.executable, "-m", "fabric.launch"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as agent:
        agent.stdin.write(spec.model_dump_json().encode() + b"\n")
        agent.stdin.close()
        agent.stdin = None
        try:
            yield agent
        finally:
            agent.kill()


def make_task(max_tokens: int) -> Task:
    request = Request(
        model="fixed", input=TextInput(text="hello"), sampling=Sampling(max_tokens=max_tokens)
    )
    return Task(
        id=request.id, attempt=1, request=request, digest="sha256:" + "0" * 64, deadline_s=60
    )


async def wait_until(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def wait_exit(agent: subprocess.Popen[bytes], timeout_s: float = 20.0) -> int:
    return await asyncio.to_thread(agent.wait, timeout_s)


async def test_site_comes_up_recovers_and_drains(hub, tmp_path) -> None:
    with start_agent(tmp_path, hub.url) as agent:
        first = await hub.accept()
        assert hub.launches[0] == {"site": "alpha", "model": "fixed@1"}
        await wait_until(lambda: ("ready", "") in hub.reports)
        assert hub.reports[0][0] in ("pending", "starting")
        assert hub.expected[0] == (first.hello.instance, pytest.approx(USUAL_START_S, abs=5))

        instance = next(
            psutil.Process(json.loads(path.read_text())["pid"]) for path in tmp_path.glob("*.json")
        )
        instance.kill()
        second = await hub.accept()
        assert second.hello.instance != first.hello.instance
        assert hub.ended[0]["instance"] == first.hello.instance
        assert "code -9" in hub.ended[0]["reason"]
        # By now it knows better.
        instance, ready_in_s = next(one for one in hub.expected if one[0] == second.hello.instance)
        assert 0 < ready_in_s < COMES_UP_S

        processes = guarded_by(agent.pid)
        events = second.run(make_task(50))
        await anext(events)
        agent.send_signal(signal.SIGTERM)
        assert isinstance([event async for event in events][-1], Finished)
        assert await second.wait_closed() == "drained"
        assert await wait_exit(agent) == 0
        assert psutil.wait_procs(processes, timeout=20)[1] == []
        assert hub.reports[-1][0] == "stopped"


async def test_model_that_never_loads_is_given_up_after_three_times(hub, tmp_path) -> None:
    hub.source = "fixed-delay:broken=1"
    with start_agent(tmp_path, hub.url) as agent:
        assert await wait_exit(agent, COMES_UP_S) == 1
        assert len(hub.launches) == 3
        state, detail = hub.reports[-1]
        assert state == "failed"
        assert "3 instances of 'fixed' ended in a row" in detail
        assert "told so" in detail
        assert "told so" in agent.stderr.read().decode().splitlines()[-1]


async def test_refused_agent_says_so_and_ends(hub, tmp_path) -> None:
    with start_agent(tmp_path, hub.url, token="wrong") as agent:
        assert await wait_exit(agent, COMES_UP_S) == 1
        assert "no such key" in agent.stderr.read().decode()


async def test_killed_site_leaves_nothing_within_two_seconds(hub, tmp_path) -> None:
    with start_agent(tmp_path, hub.url) as agent:
        channel = await hub.accept()
        processes = guarded_by(agent.pid)
        assert len(processes) > 4
        began_at = time.monotonic()
        os.killpg(agent.pid, signal.SIGKILL)
        await channel.wait_closed()
        assert wait_ended(processes, timeout_s=2) == []
        assert time.monotonic() - began_at < 2


async def test_agent_waits_for_the_hub_and_ends_when_asked(tmp_path, free_port) -> None:
    with start_agent(tmp_path, f"http://127.0.0.1:{free_port}") as agent:
        log = agent.stderr
        lines = iter(log.readline, b"")
        await asyncio.to_thread(lambda: next(line for line in lines if b"is pending" in line))
        agent.send_signal(signal.SIGTERM)
        assert await wait_exit(agent) == 0
