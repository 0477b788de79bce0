"""Whole instance processes: ready, drained, refused, orphaned."""

import asyncio
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fabric.errors import SessionLost
from fabric.instance import process
from fabric.messages import (
    Failed,
    Finished,
    InstanceState,
    Request,
    Sampling,
    Task,
    TextInput,
    Token,
)
from fabric.testing.engine import FixedDelayEngine
from fabric.testing.ports import reserved_port
from fabric.testing.rig import InstanceProcess, get_spec, serve_hub_end, start_instance


def make_task(max_tokens: int) -> Task:
    request = Request(
        model="fixed", input=TextInput(text="hello"), sampling=Sampling(max_tokens=max_tokens)
    )
    return Task(
        id=request.id, attempt=1, request=request, digest="sha256:" + "0" * 64, deadline_s=60
    )


async def collect(events) -> list:
    return [event async for event in events]


async def wait_exit(instance: InstanceProcess, timeout_s: float = 10.0) -> int:
    return await asyncio.to_thread(instance.process.wait, timeout_s)


async def test_a_manifest_of_points_too_large_for_a_session_takes_the_mode_away(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = FixedDelayEngine()
    instance = process.Instance(get_spec(tmp_path), lambda _spec, _keep: engine)
    instance._engine = engine
    told = instance._hello()
    assert (told.points, "program" in told.limits.modes) == (engine.info.points, True)
    monkeypatch.setattr(process, "MAX_POINTS_BYTES", len(engine.info.points.model_dump_json()) - 1)
    other = process.Instance(get_spec(tmp_path), lambda _spec, _keep: engine)
    other._engine = engine
    assert (other._hello().points, other._hello().limits.modes) == (None, ("query", "embed"))


def test_ready_instance_tells_its_owner_alone(tmp_path) -> None:
    with start_instance(get_spec(tmp_path)) as instance:
        status = instance.wait_for(InstanceState.READY)
        assert status.pid == instance.process.pid
        assert status.direct_url.startswith("ws://127.0.0.1:")
        assert stat.S_IMODE(Path(instance.spec.status_path).stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("engine", "digest", "reason"),
    [
        ("broken=1", None, "cannot be loaded"),
        ("fail_after=2", None, "canary failed"),
        ("stop_after=0", None, None),
        ("token_s=slow", None, "ValueError"),
        ("digest=sha256:a", "sha256:b", "has the digest sha256:a where sha256:b was expected"),
    ],
    ids=[
        "not-loadable",
        "canary-fails",
        "eos-is-ignored-by-the-canary",
        "not-foreseen",
        "other-digest",
    ],
)
def test_instance_is_ready_only_after_a_canary_of_the_right_model(
    tmp_path, engine, digest, reason
) -> None:
    with start_instance(get_spec(tmp_path, engine=engine, digest=digest)) as instance:
        status = instance.wait_for(InstanceState.READY, InstanceState.FAILED)
        if reason is None:
            assert status.state == InstanceState.READY
        else:
            assert status.state == InstanceState.FAILED
            assert reason in status.detail
            assert instance.process.wait(30) == 1


async def test_hello_carries_what_was_loaded(tmp_path) -> None:
    async with serve_hub_end() as hub:
        spec = get_spec(tmp_path, engine="context_tokens=77", session_url=hub.url, site="beta")
        with start_instance(spec) as instance:
            hello = (await hub.accept()).hello
            assert (hello.instance, hello.site) == (spec.launch.instance, "beta")
            assert hello.limits.context_tokens == 77
            assert hello.direct_url == instance.direct_url


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
async def test_signal_drains(tmp_path, number) -> None:
    async with serve_hub_end() as hub:
        spec = get_spec(tmp_path, engine="token_s=0.02", session_url=hub.url)
        with start_instance(spec) as instance:
            channel = await hub.accept()
            events = channel.run(make_task(30))
            got = [await anext(events), await anext(events)]
            instance.process.send_signal(number)
            got += [event async for event in events]
            assert sum(isinstance(event, Token) for event in got) == 30
            assert isinstance(got[-1], Finished)
            assert await channel.wait_closed() == "drained"
            assert await wait_exit(instance) == 0
            assert instance.status().state == InstanceState.STOPPED


async def test_sixteen_rows_finish_within_the_grace_period_or_come_back(tmp_path) -> None:
    async with serve_hub_end() as hub:
        spec = get_spec(tmp_path, engine="token_s=0.05,context_tokens=50000", session_url=hub.url)
        with start_instance(spec.model_copy(update={"grace_s": 4.0})) as instance:
            channel = await hub.accept()
            runs = [channel.run(make_task(5 if i % 2 else 10_000)) for i in range(16)]
            firsts = [await anext(events) for events in runs]
            instance.process.send_signal(signal.SIGTERM)
            rest = await asyncio.gather(*(collect(events) for events in runs))
            lasts = [[first, *more][-1] for first, more in zip(firsts, rest, strict=True)]
            assert all(isinstance(last, Finished) for last in lasts[1::2])
            for last in lasts[::2]:
                assert isinstance(last, Failed)
                assert last.failure.code == "engine_stopped"
                assert last.failure.to_error().retryable, "the broker sends it elsewhere"
            assert await channel.wait_closed() == "drained"
            assert await wait_exit(instance) == 0


async def test_instance_ends_with_its_parent(tmp_path) -> None:
    async with serve_hub_end() as hub:
        spec = get_spec(tmp_path, engine="token_s=0.05", session_url=hub.url)
        with start_instance(spec) as instance:
            channel = await hub.accept()
            events = channel.run(make_task(1000))
            await anext(events)
            began_at = time.monotonic()
            instance.process.stdin.close()
            with pytest.raises(SessionLost):
                async for _ in events:
                    pass
            await wait_exit(instance)
            assert time.monotonic() - began_at < 1.0


async def test_a_parent_that_says_why_is_quoted(tmp_path) -> None:
    with start_instance(get_spec(tmp_path)) as instance:
        instance.wait_for(InstanceState.READY)
        instance.process.stdin.write(b"The node n2 is lost.\n")
        instance.process.stdin.close()
        assert await wait_exit(instance, 60.0) == 1
        status = instance.status()
        assert (status.state, status.detail) == (InstanceState.FAILED, "The node n2 is lost.")


async def test_a_hub_that_is_not_there_is_told_of_and_given_up(tmp_path) -> None:
    with reserved_port() as port:
        spec = get_spec(tmp_path, session_url=f"ws://127.0.0.1:{port}/v1/fabric/session")
        with start_instance(spec.model_copy(update={"join_s": 2.0})) as instance:
            assert await wait_exit(instance, 60.0) == 1
            status = instance.status()
            assert status.state == InstanceState.FAILED
            assert f"ws://127.0.0.1:{port}" in status.detail
            assert "from its node for 2 s" in status.detail


async def test_a_hub_that_comes_late_is_joined(tmp_path) -> None:
    async with serve_hub_end() as hub:
        spec = get_spec(tmp_path, session_url=hub.url)
        with start_instance(spec.model_copy(update={"join_s": 1.0})) as instance:
            first = await hub.accept()
            hub.connections[0].transport.abort()
            second = await hub.accept(timeout_s=20.0)
            assert second.hello.instance == first.hello.instance
            assert instance.process.poll() is None


async def test_instance_comes_back_after_the_connection_drops(tmp_path) -> None:
    async with serve_hub_end() as hub:
        spec = get_spec(tmp_path, engine="token_s=0.05", session_url=hub.url)
        with start_instance(spec):
            first = await hub.accept()
            events = first.run(make_task(1000))
            await anext(events)
            hub.connections[0].transport.abort()
            with pytest.raises(SessionLost):
                async for _ in events:
                    pass
            second = await hub.accept()
            assert second.hello.instance == first.hello.instance
            assert second.hello.load.num_running == 0, "the lost session's rows are free"
            assert [type(event) async for event in second.run(make_task(1))][-1] is Finished


async def test_instance_comes_back_after_the_hub_restarts(tmp_path, free_port) -> None:
    spec = get_spec(tmp_path, session_url=f"ws://127.0.0.1:{free_port}/v1/fabric/session")
    with start_instance(spec):
        for _ in range(2):
            async with serve_hub_end(port=free_port) as hub:
                assert (await hub.accept()).hello.instance == spec.launch.instance


@pytest.mark.parametrize("code", [4401, 4409])
async def test_refused_instance_ends_with_the_reason(tmp_path, code) -> None:
    async with serve_hub_end() as hub:
        hub.refuse_with = code
        with start_instance(get_spec(tmp_path, session_url=hub.url)) as instance:
            assert await wait_exit(instance) == 1
            status = instance.status()
            assert status.state == InstanceState.FAILED
            assert "told to refuse" in status.detail


async def test_instance_waits_for_a_hub_that_is_not_up(tmp_path, free_port) -> None:
    spec = get_spec(tmp_path, session_url=f"ws://127.0.0.1:{free_port}/v1/fabric/session")
    with start_instance(spec) as instance:
        await asyncio.to_thread(instance.wait_for, InstanceState.READY)
        async with serve_hub_end(port=free_port) as hub:
            assert (await hub.accept()).hello.instance == spec.launch.instance


def test_instance_modules_import_no_torch() -> None:
    code = (
        "import sys, fabric.instance.process, fabric.instance.__main__, fabric.testing.rig;"
        "print('torch' in sys.modules)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert answer.stdout.strip() == "False"
