"""The hub's added latency over calling an instance directly, with a fixed-delay upstream.

Three processes on loopback: a hub as ``fabric-admin hub`` runs it, an instance that answers after a
fixed delay, and this load generator. Closed-loop clients ask the instance by its direct route and
by the hub in turns, within each round; what is compared is the same work at the same concurrency.
Every request through the hub is authenticated, counted against limits of requests, tokens and
concurrency, admitted, held, placed, settled and recorded.

With ``--litellm VENV`` LiteLLM's proxy stands beside it before an upstream of the same delay, asked
in the same rounds: its added latency is that over its own upstream.

``+p99`` is of the requests of all rounds together, where one pause of the machine that all clients
wait for is a hundredth of a thousand requests; ``+p99/round`` is the median of the rounds' own.

    python benchmarks/hub_overhead.py [--rounds 5] [--delay-ms 200] [--litellm VENV] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import psutil
import uvloop
from hub_overhead_figures import Sample, print_row, summarize
from hub_overhead_litellm import Peer, running_litellm

from fabric.auth import Grants
from fabric.cli import processes
from fabric.cli.federation import choose_port
from fabric.cli.seed import seed
from fabric.config import SiteModel, SiteSpec, StateDir
from fabric.dispatch.direct import open_direct
from fabric.messages import (
    EngineOptions,
    InstanceSpec,
    InstanceStatus,
    Launch,
    Request,
    Sampling,
    Task,
    TextInput,
    Token,
    new_id,
)
from fabric.sql import Database

HOST = "127.0.0.1"
MODEL = "fixed-delay"
MAX_TOKENS = 8
CONCURRENCIES = (1, 4, 16, 64)


@dataclass(frozen=True, slots=True)
class Rig:
    """Where the two ways go."""

    base_url: str
    api_key: str
    launch: Launch
    direct_url: str
    direct_token: str
    digest: str
    hub_pid: int
    peer: Peer | None = None


Ask = Callable[[], Awaitable[Sample]]


@contextlib.contextmanager
def running_rig(delay_s: float) -> Iterator[Rig]:
    """Start a hub and one instance, and end both."""
    with tempfile.TemporaryDirectory(prefix="fabric-bench-") as folder:
        state = StateDir(Path(folder))
        state.create()
        source = f"fixed-delay:first_token_s={delay_s},token_s=0"
        options = EngineOptions(max_rows=256)
        model = SiteModel(name=MODEL, source=source, context_tokens=2048, options=options)
        site = SiteSpec(name="bench", models=(model,))
        seeded = seed(state.database_url, [site], project="bench", label="bench", grant_usu=10**15)
        with Database(state.database_url) as database:
            # Never met, and counted at every request.
            bounds = {"requests_per_min": 10**9, "tokens_per_min": 10**12, "max_concurrent": 10**6}
            for subject in ("project:bench", "key:*"):
                Grants(database).set_limit(subject, **bounds)
        port = choose_port(HOST, 0)
        base_url = f"http://{HOST}:{port}"
        hub = processes.spawn(
            [
                *(sys.executable, "-m", "fabric.cli.admin", "hub"),
                *("--state-dir", folder, "--host", HOST, "--port", str(port)),
            ],
            log_path=state.log_path("hub"),
        )
        instance: subprocess.Popen[bytes] | None = None
        try:
            wait_for(lambda: httpx.get(f"{base_url}/healthz").status_code == 200)
            launch = Launch.model_validate(
                httpx.post(
                    f"{base_url}/v1/fabric/launches",
                    headers={"Authorization": f"Bearer {seeded.site_tokens['bench']}"},
                    json={"site": "bench", "model": MODEL},
                )
                .raise_for_status()
                .json()
            )
            spec = InstanceSpec(
                launch=launch,
                session_url=f"ws://{HOST}:{port}{launch.session_path}",
                direct_token=new_id("direct"),
                options=options,
                status_path=str(state.path / "status.json"),
            )
            instance = start_instance(spec, state.log_path("instance"))
            key = {"Authorization": f"Bearer {seeded.api_key}"}
            replica = wait_for(
                lambda: httpx.get(f"{base_url}/v1/fabric/sites", headers=key).json()["data"][0][
                    "replicas"
                ][0]
            )
            status = InstanceStatus.model_validate_json(Path(spec.status_path).read_bytes())
            assert status.direct_url is not None
            yield Rig(
                base_url=base_url,
                api_key=seeded.api_key,
                launch=launch,
                direct_url=status.direct_url,
                direct_token=spec.direct_token,
                digest=replica["digest"],
                hub_pid=hub.pid,
            )
        finally:
            if instance is not None:
                instance.kill()
                instance.wait()
            processes.end([hub], grace_s=5)


def start_instance(spec: InstanceSpec, log_path: Path) -> subprocess.Popen[bytes]:
    """Start an instance process; it ends when its standard input does."""
    with log_path.open("wb") as log:
        instance = subprocess.Popen(
            [sys.executable, "-m", "fabric.testing.instance"],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
        )
    assert instance.stdin is not None
    instance.stdin.write(spec.model_dump_json().encode() + b"\n")
    instance.stdin.flush()
    return instance


def wait_for(probe: Callable[[], object]):
    """Return the first true value of ``probe``."""
    for _ in processes.poll(30):
        with contextlib.suppress(httpx.TransportError, KeyError, IndexError):
            if value := probe():
                return value
    raise TimeoutError("The rig did not come up in 30 s.")


@contextlib.asynccontextmanager
async def direct_client(rig: Rig, *, stream: bool):
    """Give a function that asks the instance over a connection of its own."""
    channel = await open_direct(rig.direct_url, rig.direct_token)

    async def ask() -> Sample:
        request = Request(
            model=MODEL,
            input=TextInput(text="one two three"),
            sampling=Sampling(max_tokens=MAX_TOKENS),
            stream=stream,
        )
        task = Task(id=request.id, attempt=1, request=request, digest=rig.digest, deadline_s=60)
        started = time.perf_counter()
        first_s = 0.0
        async for event in channel.run(task):
            if not first_s and isinstance(event, Token):
                first_s = time.perf_counter() - started
        return Sample(first_s, time.perf_counter() - started)

    try:
        yield ask
    finally:
        await channel.close()


def hub_client(rig: Rig, *, stream: bool):
    """Give a function that asks the hub."""
    fields = {"prompt": "one two three"}
    return http_client(rig.base_url, "/v1/completions", rig.api_key, fields, stream=stream)


def upstream_client(rig: Rig, *, stream: bool):
    """Give a function that asks what is behind the peer."""
    return chat_client(rig.peer.upstream_url, rig.peer.api_key, stream=stream)


def litellm_client(rig: Rig, *, stream: bool):
    """Give a function that asks the peer."""
    return chat_client(rig.peer.proxy_url, rig.peer.api_key, stream=stream)


def chat_client(base_url: str, api_key: str, *, stream: bool):
    """Give a function that asks for a chat completion."""
    fields = {"messages": [{"role": "user", "content": "one two three"}]}
    return http_client(base_url, "/v1/chat/completions", api_key, fields, stream=stream)


@contextlib.asynccontextmanager
async def http_client(base_url: str, path: str, api_key: str, fields: dict, *, stream: bool):
    """Give a function that asks over a kept-alive connection of its own.

    It speaks just enough HTTP/1.1 that the client's own cost stays small on all ways.
    """
    url = httpx.URL(base_url)
    reader, writer = await asyncio.open_connection(url.host, url.port)
    fields = {"model": MODEL, "max_tokens": MAX_TOKENS, "stream": stream, **fields}
    body = json.dumps(fields).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {url.host}\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {api_key}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    message = head.encode() + body

    async def ask() -> Sample:
        started = time.perf_counter()
        writer.write(message)
        answer = (await reader.readuntil(b"\r\n\r\n")).lower()
        assert b" 200 " in answer.split(b"\r\n", 1)[0], answer
        first_s = 0.0
        if b"content-length: " in answer:
            size = int(answer.split(b"content-length: ")[1].split(b"\r\n")[0])
            await reader.readexactly(size)
        else:
            while chunk_size := int(await reader.readline(), 16):
                chunk = await reader.readexactly(chunk_size + 2)
                if not first_s and b"word" in chunk:
                    first_s = time.perf_counter() - started
            await reader.readline()
        return Sample(first_s, time.perf_counter() - started)

    try:
        yield ask
    finally:
        writer.close()


async def measure(
    client, rig: Rig, *, num_clients: int, num_requests: int, stream: bool, think_s: float
):
    """Run closed-loop clients side by side and return all their samples."""

    async def loop() -> list[Sample]:
        async with client(rig, stream=stream) as ask:
            await ask()
            samples = []
            for _ in range(num_requests):
                # Without a pause the fixed delay keeps all clients in step for ever, once a
                # stall has brought them together; people and programs are not in step.
                await asyncio.sleep(random.uniform(0, 2 * think_s))
                samples.append(await ask())
            return samples

    return [
        sample
        for part in await asyncio.gather(*(loop() for _ in range(num_clients)))
        for sample in part
    ]


async def run(
    rig: Rig, *, clients: Sequence[int], rounds: int, requests_per_round: int, think_s: float
) -> list[dict[str, object]]:
    """Measure every concurrency, all ways in turns."""
    ways = {"direct": direct_client, "hub": hub_client}
    if rig.peer is not None:
        ways |= {"upstream": upstream_client, "litellm": litellm_client}
    servers = {"hub": rig.hub_pid} | ({"litellm": rig.peer.proxy_pid} if rig.peer else {})
    rows = []
    for num_clients in clients:
        for stream in (False, True):
            samples: dict[str, list[list[Sample]]] = {name: [] for name in ways}
            cpu_s = dict.fromkeys(servers, 0.0)
            for turn in range(rounds):
                order = list(ways) if turn % 2 else list(reversed(ways))
                for name in order:
                    before_s = cpu_s_of(servers.get(name))
                    part = await measure(
                        ways[name],
                        rig,
                        num_clients=num_clients,
                        num_requests=min(40, max(8, requests_per_round // num_clients)),
                        stream=stream,
                        think_s=think_s,
                    )
                    samples[name].append(part)
                    if name in servers:
                        cpu_s[name] += cpu_s_of(servers[name]) - before_s
            rows.append(summarize(num_clients, stream, samples, cpu_s))
            print_row(rows[-1])
    return rows


def cpu_s_of(pid: int | None) -> float:
    """Return the seconds of a core that a process and its children have taken."""
    if pid is None:
        return 0.0
    process = psutil.Process(pid)
    family = [process, *process.children(recursive=True)]
    return sum(each.cpu_times().user + each.cpu_times().system for each in family)


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=320, help="a round, over all clients")
    parser.add_argument("--delay-ms", type=float, default=200.0, help="until the first token")
    parser.add_argument("--think-ms", type=float, default=100.0, help="mean pause of a client")
    parser.add_argument("--clients", type=int, nargs="+", default=CONCURRENCIES)
    parser.add_argument("--litellm", type=Path, metavar="VENV", help="an environment that has it")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args()
    print(f"upstream: {args.delay_ms:g} ms, {MAX_TOKENS} tokens; times in ms")
    print(
        "clients  measure       requests    +p50     +p95     +p99  +p99/round    hub p99   ratio"
        "  CPU ms"
    )
    load_before = os.getloadavg()
    with (
        running_rig(args.delay_ms / 1e3) as rig,
        peer_of(args.litellm, args.delay_ms / 1e3) as peer,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        rig = replace(rig, peer=peer)
        rows = runner.run(
            run(
                rig,
                clients=args.clients,
                rounds=args.rounds,
                requests_per_round=args.requests,
                think_s=args.think_ms / 1e3,
            )
        )
    if args.json:
        report = {
            "benchmark": "hub_overhead",
            "machine": {
                "cpu": cpu_name(),
                "cores": os.cpu_count(),
                "python": platform.python_version(),
                "load_average_before": load_before,
                "load_average_after": os.getloadavg(),
            },
            "delay_ms": args.delay_ms,
            "think_ms": args.think_ms,
            "tokens": MAX_TOKENS,
            "rounds": args.rounds,
            "rows": rows,
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


@contextlib.contextmanager
def peer_of(venv: Path | None, delay_s: float) -> Iterator[Peer | None]:
    """Start the peer, if its environment was given."""
    if venv is None:
        yield None
        return
    with running_litellm(venv, delay_s) as peer:
        yield peer


def cpu_name() -> str:
    """Return the processor's name, where the system tells."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(": ")[2]
    return platform.processor()


if __name__ == "__main__":
    sys.exit(main())
