"""What permissions and limits add to a request: microseconds of CPU, in one thread.

Run ``python benchmarks/access.py``; it needs no hub and writes ``benchmarks/results/access.json``.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from pathlib import Path

from fabric.auth import Decision, Grant, Identity, Limit, Rules, get_modes
from fabric.broker.limits import Limiter
from fabric.messages import Request, TextInput

RESULTS = Path(__file__).parent / "results" / "access.json"
NUM_PROJECTS, NUM_MODELS = 100, 10
NUM_REQUESTS, NUM_ROUNDS = 5_000, 7
CALLER = Identity(key_id="abc", project="p0", scopes=frozenset({"query"}), max_concurrent=64)
REQUEST = Request(model="m3", input=TextInput(text="x"))


def get_rules(*, private: bool, limited: bool) -> Rules:
    """Return rules with a thousand grants, and limits of all keys and projects."""
    models = [f"m{number}" for number in range(NUM_MODELS)]
    grants = {
        f"project:p{project}": tuple(
            Grant(id=f"{project}-{model}", subject=f"project:p{project}", model=model, site=None)
            for model in models
        )
        for project in range(NUM_PROJECTS)
    }
    limits = {
        f"{kind}:*": Limit(
            subject=f"{kind}:*",
            requests_per_min=10**9,
            tokens_per_min=10**12,
            max_concurrent=10**6,
        )
        for kind in ("key", "project")
    }
    return Rules(
        version=1,
        models=frozenset(models) if private else frozenset(),
        grants=grants if private else {},
        limits=limits if limited else {},
    )


def measure_us(rules: Rules, num_sites: int) -> float:
    """Return the microseconds of CPU of one admission and its end."""
    limiter, sites = Limiter(), [f"s{number}" for number in range(num_sites)]
    began_s = time.process_time()
    for _ in range(NUM_REQUESTS):
        permits, modes = rules.permits(CALLER), get_modes(REQUEST)
        turn = limiter.enter(CALLER, rules.limits_of(CALLER))
        for site in sites:
            decision = permits.decide(model="m3", site=site, modes=modes, tier="standard")
            assert decision is Decision.ALLOWED
        limiter.reserve(turn, 100, rules.limits_of(CALLER))
        limiter.leave(turn, 20)
        limiter.standing(rules.limits_of(CALLER))
    return (time.process_time() - began_s) / NUM_REQUESTS * 1e6


def main() -> None:
    """Print and write medians and spreads."""
    kinds = [(p, limited, n) for p in (False, True) for limited in (False, True) for n in (3, 20)]
    found: dict[tuple[bool, bool, int], list[float]] = {kind: [] for kind in kinds}
    for _ in range(NUM_ROUNDS):
        for private, limited, num_sites in kinds:
            rules = get_rules(private=private, limited=limited)
            found[private, limited, num_sites].append(measure_us(rules, num_sites))
    rows = [
        {
            "private_model": private,
            "limits": limited,
            "num_sites": num_sites,
            "median_us": round(statistics.median(values), 1),
            "least_us": round(min(values), 1),
            "most_us": round(max(values), 1),
        }
        for (private, limited, num_sites), values in found.items()
    ]
    for row in rows:
        print(row)
    told = {"load_average": os.getloadavg(), "num_grants": NUM_PROJECTS * NUM_MODELS, "rows": rows}
    RESULTS.write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
