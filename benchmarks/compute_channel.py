"""Three ways to an instance behind Globus Compute, in one run: raw SDK, compute channel, session.

A rig on loopback: the service's stand-in with the published limits, RabbitMQ, and a real endpoint
agent, whose worker runs an instance that answers at once. The instance is asked by its direct
route, by the session it opens to a hub's end, and by the registered function ``infer`` through the
service. The raw SDK calls a function that returns its argument, on the same endpoint, as any user
would. The ways take turns within each round.

    python benchmarks/compute_channel.py [--rounds 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from globus_compute_sdk import Executor
from hub_overhead import cpu_name

from fabric.compute import ServiceLimits
from fabric.dispatch.direct import open_direct
from fabric.dispatch.protocol import Channel
from fabric.dispatch.relay import RelayChannel
from fabric.messages import Finished, Request, Sampling, Task, TextInput, Token
from fabric.testing.compute import TASK_ENVIRON, ComputeSite, get_rig_pool
from fabric.testing.globus import Globus, running_globus
from fabric.testing.rig import serve_hub_end

ECHO = "def echo(value):\n    return value\n"
CONFIG = {"engine": "processes", "workers": 4}
PART = ServiceLimits(max_requests=10)
"""Half of what the service allows; the raw SDK calls as the same user."""
MAX_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Sample:
    """One request: seconds to its first token, as its caller sees it, and to its end."""

    first_s: float
    total_s: float


Ask = Callable[[], Awaitable[Sample]]


class RawSdk:
    """The SDK as any user has it: defaults throughout, one function, one Executor."""

    def __init__(self, globus: Globus, site: ComputeSite) -> None:
        self._client = globus.client("hub")
        self._function_id = UUID(self._client.register_source_code(ECHO, "echo"))
        self._executor = Executor(
            site.target.endpoint_id, self._client, user_endpoint_config=dict(site.target.config)
        )

    async def ask(self) -> Sample:
        """Call the function once."""
        started = time.perf_counter()
        await asyncio.wrap_future(self._submit(0))
        took_s = time.perf_counter() - started
        return Sample(took_s, took_s)

    async def flood(self, num_requests: int) -> float:
        """Return the seconds that so many calls at once take."""
        started = time.perf_counter()
        futures = [self._submit(number) for number in range(num_requests)]
        results = await asyncio.gather(*map(asyncio.wrap_future, futures))
        assert results == list(range(num_requests))
        return time.perf_counter() - started

    def close(self) -> None:
        """End the Executor."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _submit(self, value: int):
        return self._executor.submit_to_registered_function(str(self._function_id), (value,))


class ChannelWay:
    """Requests on a channel, each a prompt and eight tokens."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    async def ask(self) -> Sample:
        """Ask once."""
        request = Request(
            model="fixed",
            input=TextInput(text="one two three"),
            sampling=Sampling(max_tokens=MAX_TOKENS, temperature=0.0),
        )
        digest = self._channel.hello.digest
        task = Task(id=request.id, attempt=1, request=request, digest=digest, deadline_s=120.0)
        started = time.perf_counter()
        first_s = 0.0
        async for event in self._channel.run(task):
            if not first_s and isinstance(event, Token):
                first_s = time.perf_counter() - started
        assert isinstance(event, Finished), event
        return Sample(first_s, time.perf_counter() - started)

    async def flood(self, num_requests: int) -> float:
        """Return the seconds that so many requests at once take."""
        started = time.perf_counter()
        await asyncio.gather(*(self.ask() for _ in range(num_requests)))
        return time.perf_counter() - started


@asynccontextmanager
async def running_ways(globus: Globus, site: ComputeSite) -> AsyncIterator[dict]:
    """Start one instance on the endpoint and give every way to it."""
    async with AsyncExitStack() as stack:
        hub = await stack.enter_async_context(serve_hub_end(heartbeat_s=2.0))
        instance = stack.enter_context(site.instance(max_rows=256, session_url=hub.url))
        assert instance.status.direct_url is not None
        token = instance.spec.direct_token
        direct = await open_direct(instance.status.direct_url, token)
        stack.push_async_callback(direct.close)
        session = await hub.accept(timeout_s=60)
        stack.push_async_callback(session.close)
        compute = await RelayChannel.open(site.get_relay(instance))
        stack.push_async_callback(compute.close)
        raw = RawSdk(globus, site)
        stack.callback(raw.close)
        yield {
            "raw SDK": raw,
            "compute channel": ChannelWay(compute),
            "session channel": ChannelWay(session),
            "direct call": ChannelWay(direct),
        }


async def measure(
    ways: dict, *, rounds: int, num_requests: int, num_slow: int, num_fast: int
) -> dict[str, dict]:
    """Let the ways take turns; ``num_slow`` requests in a row by the service, else ``num_fast``."""
    samples: dict[str, list[list[Sample]]] = {name: [] for name in ways}
    floods: dict[str, list[float]] = {name: [] for name in ways}
    for name, way in ways.items():
        await way.ask()
        print(f"{name} answers", file=sys.stderr, flush=True)
    for turn in range(rounds):
        for name in list(ways) if turn % 2 else list(reversed(ways)):
            slow = name in ("raw SDK", "compute channel")
            count = num_slow if slow else num_fast
            samples[name].append([await ways[name].ask() for _ in range(count)])
            floods[name].append(await ways[name].flood(num_requests))
        print(f"round {turn + 1} of {rounds}", file=sys.stderr, flush=True)
    return {name: {"samples": samples[name], "floods": floods[name]} for name in ways}


def summarize(measured: dict[str, dict], num_requests: int) -> list[dict[str, object]]:
    """Return a row for each way."""
    rows = []
    for name, figures in measured.items():
        flat = [sample for part in figures["samples"] for sample in part]
        rates = [num_requests / took_s for took_s in figures["floods"]]
        rows.append(
            {
                "way": name,
                "num_samples": len(flat),
                "round_trip_ms": percentiles([sample.total_s for sample in flat]),
                "first_token_ms": percentiles([sample.first_s for sample in flat]),
                "per_s": statistics.median(rates),
                "per_s_by_round": rates,
            }
        )
    return rows


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return p50 and p95 in milliseconds."""
    cuts = statistics.quantiles(values, n=20, method="inclusive")
    return {"p50": cuts[9] * 1e3, "p95": cuts[18] * 1e3}


def median_first_s(samples: Sequence[Sample]) -> float:
    """Return the median time to the first token."""
    return statistics.median(sample.first_s for sample in samples)


def compare(measured: dict[str, dict]) -> dict[str, object]:
    """Return what the targets are about, with the spread over rounds."""
    ratios = [
        raw_s / channel_s
        for raw_s, channel_s in zip(
            measured["raw SDK"]["floods"], measured["compute channel"]["floods"], strict=True
        )
    ]
    added = [
        1e3 * (median_first_s(one) - median_first_s(two))
        for one, two in zip(
            measured["session channel"]["samples"], measured["direct call"]["samples"], strict=True
        )
    ]
    return {
        "compute_channel_over_raw_sdk_throughput": statistics.median(ratios),
        "compute_channel_over_raw_sdk_throughput_by_round": ratios,
        "session_added_first_token_p50_ms": statistics.median(added),
        "session_added_first_token_p50_ms_by_round": added,
    }


def print_table(rows: list[dict], targets: dict, violations: list[str]) -> None:
    """Print the figures."""
    print("way              round trip p50      p95   first token p50      p95     requests/s")
    for row in rows:
        trip, first = row["round_trip_ms"], row["first_token_ms"]
        spread = f"{min(row['per_s_by_round']):.0f}-{max(row['per_s_by_round']):.0f}"
        print(
            f"{row['way']:<16} {trip['p50']:>11.1f} ms {trip['p95']:>8.1f}"
            f" {first['p50']:>14.1f} ms {first['p95']:>8.1f} {row['per_s']:>8.0f} ({spread})"
        )
    ratio = targets["compute_channel_over_raw_sdk_throughput"]
    added = targets["session_added_first_token_p50_ms"]
    print(f"compute channel / raw SDK, in a flood: {ratio:.2f} (target: 0.90 or more)")
    print(f"session's first token over a direct call: {added:+.2f} ms (target: 20 or less)")
    print(f"limits of the service exceeded: {len(violations)} times (target: 0)")


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=1000, help="at once, in each round")
    parser.add_argument("--slow", type=int, default=8, help="one by one, through the service")
    parser.add_argument("--fast", type=int, default=50, help="one by one, session and direct")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="fabric-bench-") as folder,
        running_globus(Path(folder)) as globus,
        globus.endpoint("bench", owner="hub", task_environ=TASK_ENVIRON) as endpoint,
        get_rig_pool(globus, "hub", PART) as pool,
    ):
        site = ComputeSite.get(pool, endpoint, Path(folder) / "site", CONFIG)

        async def run() -> dict[str, dict]:
            async with running_ways(globus, site) as ways:
                return await measure(
                    ways,
                    rounds=args.rounds,
                    num_requests=args.requests,
                    num_slow=args.slow,
                    num_fast=args.fast,
                )

        measured = asyncio.run(run())
        violations = globus.violations()
    rows, targets = summarize(measured, args.requests), compare(measured)
    print_table(rows, targets, violations)
    if args.json:
        report = {
            "benchmark": "compute_channel",
            "machine": {
                "cpu": cpu_name(),
                "cores": os.cpu_count(),
                "python": platform.python_version(),
            },
            "rounds": args.rounds,
            "num_requests": args.requests,
            "tokens": MAX_TOKENS,
            "rows": rows,
            "targets": targets,
            "violations": violations,
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
