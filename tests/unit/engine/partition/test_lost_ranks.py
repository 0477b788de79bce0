"""Whatever happens to a rank, the instance ends with a reason and leaves nothing behind."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from fabric.dispatch.direct import open_direct
from fabric.messages import (
    EngineOptions,
    Failed,
    Finished,
    InstanceState,
    Request,
    Sampling,
    Task,
    Token,
    TokensInput,
)
from fabric.testing.rig import InstanceProcess, get_spec, start_instance

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PATIENCE_S = 120.0
CONTEXT_TOKENS = 8192


@pytest.fixture(scope="module")
def long_dir(save_model, tiny_llama) -> Path:
    """A model whose answers take a while."""
    return save_model(tiny_llama(max_position_embeddings=CONTEXT_TOKENS))


@contextmanager
def running(directory: Path, model: Path, **options: object) -> Iterator[InstanceProcess]:
    """Run an instance over two ranks until it is ready."""
    spec = get_spec(directory, model="tiny")
    layout = {"tensor_parallel": 2, "dtype": "float32", "num_threads": 1, "cache_bytes": 2**24}
    spec = spec.model_copy(
        update={
            "launch": spec.launch.model_copy(update={"source": str(model)}),
            "options": EngineOptions.model_validate(layout | options),
            "grace_s": PATIENCE_S,
        }
    )
    with start_instance(spec, "fabric.instance") as instance:
        children: list[psutil.Process] = []
        try:
            yield instance
        finally:
            with suppress(psutil.NoSuchProcess):
                children = psutil.Process(instance.process.pid).children(recursive=True)
            for process in children:
                with suppress(psutil.NoSuchProcess):
                    process.kill()


def followers(instance: InstanceProcess) -> list[psutil.Process]:
    instance.wait_for(InstanceState.READY, timeout_s=PATIENCE_S)
    found = psutil.Process(instance.process.pid).children(recursive=True)
    return [one for one in found if "fabric.engine.partition.follower" in one.cmdline()]


def ends_failed(instance: InstanceProcess) -> str:
    assert instance.process.wait(PATIENCE_S) == 1
    status = instance.status()
    assert status is not None
    assert status.state == InstanceState.FAILED
    return status.detail


def are_gone(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=PATIENCE_S)
    return not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]


async def stream(
    instance: InstanceProcess, max_tokens: int, at_tenth: Callable[[], object]
) -> list[object]:
    """Ask for tokens on the direct route; call ``at_tenth`` when ten have come."""
    spec = instance.spec
    channel = await open_direct(instance.direct_url, spec.direct_token)
    sampling = Sampling(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    request = Request(model="tiny", input=TokensInput(ids=(5, 6, 7)), sampling=sampling)
    task = Task(
        id=request.id,
        attempt=1,
        request=request,
        digest=channel.hello.digest,
        deadline_s=PATIENCE_S,
    )
    events: list[object] = []
    try:
        async for event in channel.run(task):
            events.append(event)
            if sum(isinstance(one, Token) for one in events) == 10 and isinstance(event, Token):
                at_tenth()
    finally:
        await channel.close()
    return events


def test_a_rank_that_hangs_while_nobody_asks_ends_the_instance(tmp_path, long_dir) -> None:
    layout = {"tensor_parallel": 1, "pipeline_parallel": 2, "rank_timeout_s": 15.0}
    with running(tmp_path, long_dir, **layout) as instance:
        ranks = followers(instance)
        ranks[0].suspend()
        detail = ends_failed(instance)
        assert "Rank 1 of the model's 2 processes is lost: it has been silent" in detail
        assert are_gone(ranks)


def test_sigterm_drains_and_ends_all_ranks(tmp_path, long_dir) -> None:
    with running(tmp_path, long_dir) as instance:
        ranks = followers(instance)
        agents = [one.parent() for one in ranks]

        def end_as_a_batch_system_does() -> None:
            for one in (*ranks, *agents):
                one.send_signal(signal.SIGTERM)
            instance.process.send_signal(signal.SIGTERM)

        events = asyncio.run(stream(instance, 400, end_as_a_batch_system_does))
        assert isinstance(events[-1], Finished)
        assert sum(isinstance(event, Token) for event in events) == 400
        assert instance.process.wait(PATIENCE_S) == 0
        assert are_gone([*ranks, *agents])


def test_ranks_end_with_rank_0(tmp_path, long_dir) -> None:
    with running(tmp_path, long_dir) as instance:
        ranks = followers(instance)
        agents = [one.parent() for one in ranks]
        instance.process.kill()
        assert are_gone([*ranks, *agents])


def test_a_rank_of_another_node_joins_and_when_killed_ends_requests_and_instance(
    tmp_path, long_dir
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    here = {"rendezvous": address, "local_ranks": 1}
    command = [
        *(sys.executable, "-m", "fabric.engine.partition.agent", "--rendezvous", address),
        *("--num-ranks", "2", "--first-rank", "1", "--local-ranks", "1", "--num-threads", "1"),
    ]
    with (
        running(tmp_path, long_dir, **here) as instance,
        subprocess.Popen(command, start_new_session=True) as agent,
    ):
        try:
            instance.wait_for(InstanceState.READY, timeout_s=PATIENCE_S)
            (rank,) = psutil.Process(agent.pid).children()
            events = asyncio.run(stream(instance, CONTEXT_TOKENS - 10, rank.kill))
            assert isinstance(events[-1], Failed)
            assert events[-1].failure.code == "engine_stopped"
            lost = "Rank 1 of the model's 2 processes is lost: it was ended by SIGKILL"
            assert lost in events[-1].failure.message
            assert lost in ends_failed(instance)
            assert agent.wait(PATIENCE_S) == 1
        finally:
            agent.kill()


def test_an_agent_ends_though_rank_0_cannot_be_told(tmp_path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    code = f"""
        from fabric.engine.partition.agent import parse_arguments, tell_rank_0
        words = "--rendezvous {address} --num-ranks 2 --first-rank 1 --local-ranks 1".split()
        tell_rank_0(parse_arguments(words), '{{"rank": 1, "exit_code": 75}}')
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    ended = subprocess.run(command, timeout=60, capture_output=True, text=True, check=True)
    assert 'rank 0 is gone, it is not told of {"rank": 1' in ended.stderr
