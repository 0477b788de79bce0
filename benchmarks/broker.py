"""The broker's choice: decisions a second, and what it is worth against other ways to choose.

Decisions are timed in seconds of processor time of one process, so that other work on the machine
does not count. The table of policies comes from ``fabric.testing.simulation``: the same world, the
same requests, the same failures and the same state machine for all; only the choice differs.

    python benchmarks/broker.py [--requests 2000] [--rounds 5] [--scale 10000] [--json FILE]
    python benchmarks/broker.py --million [--json FILE]

``--scale`` simulates so many requests on 100 sites with 10,000 replicas, under our choice alone;
``--million`` does so with a million requests and nothing else, and tells how far it is. What is not
measured stays in the file as it was.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from fabric.broker.facts import Context, Offer, ReplicaSnapshot
from fabric.broker.offers import Offers
from fabric.broker.pool import Pool
from fabric.broker.select import decide
from fabric.broker.settings import BrokerSettings
from fabric.messages import InstanceState, Request, Sampling, TextInput
from fabric.testing.simulation import (
    BASELINES,
    Arrival,
    Report,
    World,
    iter_trace,
    make_federation,
    make_trace,
    make_world,
    simulate,
)

FLEETS = ((10, 2), (1_000, 10), (1_000, 100), (10_000, 100))
NUM_DECISIONS = 3_000
TRACES = (("poisson", 0.0), ("diurnal", 1.0), ("bursty", 1.5))
PEERS = ("least-load", "first-running")
PRICE_WEIGHTS = (1.0, 4.0, 16.0, 64.0)
WORLDS: Mapping[str, Callable[[], World]] = {
    "ten centres, 1": lambda: make_federation(seed=1),
    "ten centres, 2": lambda: make_federation(seed=2),
    "five drawn sites": lambda: make_world(seed=1),
}
SCALE = (100, 100)
"""Sites, and replicas at each on average."""

Row = dict[str, object]


def make_fleet(num_replicas: int, num_sites: int) -> tuple[Pool, Context]:
    drawn = random.Random(1)
    pool = Pool(
        ReplicaSnapshot(
            instance=f"inst_{number}",
            site=f"site-{number % num_sites}",
            digest="sha256:aa",
            state=InstanceState.READY,
            ejected=False,
            context_tokens=8_192,
            max_rows=16,
            num_busy=(busy := drawn.randrange(20)),
            num_in_flight=busy,
            overhead_s=drawn.uniform(0.0, 0.1),
            prefill_tokens_per_s=drawn.uniform(1_000, 9_000),
            decode_tokens_per_s=drawn.uniform(10, 90),
            ends_in_s=drawn.uniform(100, 10_000),
        )
        for number in range(num_replicas)
    )
    offers = {
        site: Offer(
            site=site,
            allocation="allocation:astro:*",
            available_usu=10**9,
            max_charge_usu=3_000,
            expected_charge_usu=drawn.randrange(500, 1_500),
        )
        for site in (f"site-{number}" for number in range(num_sites))
    }
    return pool, Context(
        model="smol@1",
        digest="sha256:aa",
        offers=Offers(offers),
        remaining_s=300.0,
        settings=BrokerSettings(),
    )


def make_requests(num_sites: int, number: int) -> list[Request]:
    drawn = random.Random(2)
    return [
        Request(
            id=f"run_{index}",
            model="smol",
            input=TextInput(text="x" * drawn.randrange(40, 4_000)),
            sampling=Sampling(max_tokens=drawn.randrange(1, 300)),
            data_site=f"site-{drawn.randrange(num_sites)}",
            data_bytes=drawn.randrange(10**9),
        )
        for index in range(number)
    ]


def time_decisions(num_rounds: int) -> list[Row]:
    """Decide for the same requests in each fleet, fleet after fleet, round after round."""
    fleets = {size: make_fleet(*size) for size in FLEETS}
    bare: dict[tuple[int, int], list[float]] = {size: [] for size in FLEETS}
    told: dict[tuple[int, int], list[float]] = {size: [] for size in FLEETS}
    for _ in range(num_rounds):
        for size, (pool, context) in fleets.items():
            requests = make_requests(size[1], NUM_DECISIONS)
            began = time.process_time()
            for request in requests:
                decide(request, pool, context)
            bare[size].append(NUM_DECISIONS / (time.process_time() - began))
            some = requests[: NUM_DECISIONS // 20]
            began = time.process_time()
            for request in some:
                decide(request, pool, context).placement()
            told[size].append(len(some) / (time.process_time() - began))
    return [
        {
            "replicas": size[0],
            "sites": size[1],
            "decisions_per_s": round(statistics.median(bare[size])),
            "decisions_per_s_spread": [round(min(bare[size])), round(max(bare[size]))],
            "with_table_per_s": round(statistics.median(told[size])),
        }
        for size in FLEETS
    ]


def weigh_price(trace: Sequence[Arrival], weight: float) -> list[Arrival]:
    """Return the same requests from users who say what a service unit counts."""
    return [
        Arrival(
            at_s=one.at_s,
            request=one.request.model_copy(update={"weights": {"price": weight}}),
            project=one.project,
            prefix=one.prefix,
            prompt_tokens=one.prompt_tokens,
            output_tokens=one.output_tokens,
            alone_s=one.alone_s,
        )
        for one in trace
    ]


def compare(world: World, arrivals: str, skew: float, num_requests: int) -> Row:
    """Simulate one trace under every policy, and ours at several prices of a service unit."""
    trace = make_trace(world, arrivals, num_requests=num_requests, utilisation=0.6, skew=skew)
    reports = {policy: simulate(world, trace, policy) for policy in BASELINES}
    ours = {
        weight: reports["fabric"] if weight == 1 else simulate(world, weigh_price(trace, weight))
        for weight in PRICE_WEIGHTS
    }
    return {
        "trace": arrivals,
        "skew": skew,
        "policies": [report.row() for report in reports.values()],
        "ours_by_price_weight": {str(weight): report.row() for weight, report in ours.items()},
        "against": {peer: against(reports[peer], ours) for peer in PEERS},
    }


def against(peer: Report, ours: dict[float, Report]) -> Row:
    """Return how our default compares with a peer, and the least we spend for its attainment."""
    default = ours[1.0]
    enough = [report.spent_su for report in ours.values() if report.attainment >= peer.attainment]
    return {
        "p95_ratio": round(peer.percentile_s(95) / default.percentile_s(95), 2),
        "attainment_gain": round(default.attainment - peer.attainment, 4),
        "su_saved_default": round(1 - default.spent_su / peer.spent_su, 3),
        "su_saved_at_equal_attainment": round(1 - min(enough) / peer.spent_su, 3)
        if enough
        else None,
    }


def watched(trace: Iterable[Arrival], num_requests: int) -> Iterator[Arrival]:
    """Yield the requests, and tell on standard error when each twentieth of them has come."""
    began, step = time.process_time(), max(1, num_requests // 20)
    for number, arrival in enumerate(trace):
        if number and number % step == 0:
            done = f"{number:,} requests, {time.process_time() - began:.0f} s of the processor"
            print(f"{done}, {peak_gb():.2f} GB", file=sys.stderr, flush=True)
        yield arrival


def peak_gb() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)


def get_machine() -> Row:
    return {
        "cpu": platform.processor() or platform.machine(),
        "num_cpus": os.cpu_count(),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
    }


def time_scale(num_requests: int) -> Row:
    """Simulate a large fleet once; seconds are of the processor, and of what it simulates."""
    gc.set_threshold(200_000, 50, 100)  # tens of thousands of requests are alive at once
    world = make_world(*SCALE, seed=1)
    trace = iter_trace(world, "poisson", num_requests=num_requests)
    began, began_at = time.process_time(), time.monotonic()
    report = simulate(world, watched(trace, num_requests))
    processor_s = time.process_time() - began
    ends = [end.at_s + end.total_s for end in report.ends]
    return {
        "sites": len(world.sites),
        "replicas": sum(site.num_replicas for site in world.sites),
        "requests": num_requests,
        "processor_s": round(processor_s, 1),
        "requests_per_s": round(num_requests / processor_s),
        "wall_s": round(time.monotonic() - began_at, 1),
        "simulated_s": round(max(ends), 1),
        "peak_gb": peak_gb(),
        **report.row(),
    }


def show(decisions: Sequence[Row], worlds: Sequence[Row]) -> None:
    print("decisions a second (processor time, one core)")
    for row in decisions:
        print("  ", ", ".join(f"{name} {value}" for name, value in row.items()))
    for world in worlds:
        for trace in world["traces"]:  # type: ignore[attr-defined]
            print(f"\n{world['world']}, {trace['trace']}, skew {trace['skew']}")
            names = list(trace["policies"][0])
            print("  ".join(f"{name:>13}" for name in names))
            for row in trace["policies"]:
                print("  ".join(f"{row[name]!s:>13}" for name in names))
            for peer, ratios in trace["against"].items():
                print(f"  fabric against {peer}: {ratios}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=2_000, help="of each trace")
    parser.add_argument("--rounds", type=int, default=5, help="of the timed decisions")
    parser.add_argument("--scale", type=int, default=0, help="requests of the large simulation")
    parser.add_argument("--million", action="store_true", help="only that, of a million requests")
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args()
    decisions = [] if options.million else time_decisions(options.rounds)
    worlds: list[Row] = []
    for name, make in [] if options.million else WORLDS.items():
        world = make()
        traces = [compare(world, *trace, options.requests) for trace in TRACES]
        worlds.append({"world": name, "traces": traces})
    show(decisions, worlds)
    result: dict[str, object] = {}
    if not options.million:
        result = {
            "machine": get_machine(),
            "num_requests": options.requests,
            "decisions": decisions,
            "worlds": worlds,
        }
    if num_requests := 1_000_000 if options.million else options.scale:
        scale = result["scale"] = {"machine": get_machine(), **time_scale(num_requests)}
        print("\nat scale\n  ", ", ".join(f"{name} {value}" for name, value in scale.items()))
    if options.json:
        kept = json.loads(options.json.read_text()) if options.json.exists() else {}
        options.json.write_text(json.dumps(kept | result, indent=2) + "\n")


if __name__ == "__main__":
    main()
