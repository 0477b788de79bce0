"""Requests and when they arrive: Poisson, diurnal and bursty, with the skew of who asks for what.

Source of the bursty process: a Poisson process modulated by two states, calm and burst.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate

from fabric.messages import Request, Sampling, TextInput
from fabric.testing.simulation.world import World

PREFIX_TOKENS = 512
NUM_PREFIXES = 200
NUM_PROJECTS = 20
DIURNAL_PERIOD_S = 600.0
BURST_FACTOR = 3.0
BURST_S = 30.0
CALM_S = 90.0

Times = Iterator[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A request, when it comes, who pays and how long its answer turns out to be.

    ``slo_s`` is what its user finds acceptable; ``alone_s`` what it takes on an idle replica of
    average speed.
    """

    at_s: float
    request: Request
    project: str
    prefix: int
    prompt_tokens: int
    output_tokens: int
    alone_s: float

    @property
    def slo_s(self) -> float:
        """Seconds that its user finds acceptable."""
        return 2.0 + 3.0 * self.alone_s


def poisson(drawn: random.Random, rate_per_s: float) -> Times:
    """Yield times of arrivals at a constant rate."""
    now = 0.0
    while True:
        now += drawn.expovariate(rate_per_s)
        yield now


def diurnal(drawn: random.Random, rate_per_s: float) -> Times:
    """Yield times of a rate that swings between a tenth and nineteen tenths of its mean."""
    for now in poisson(drawn, 1.9 * rate_per_s):
        wanted = 1.0 + 0.9 * math.sin(2 * math.pi * now / DIURNAL_PERIOD_S)
        if drawn.random() < wanted / 1.9:
            yield now


def bursty(drawn: random.Random, rate_per_s: float) -> Times:
    """Yield times of calm that bursts interrupt, at the same mean rate."""
    calm_per_s = rate_per_s * (CALM_S + BURST_S) / (CALM_S + BURST_FACTOR * BURST_S)
    now, ends, bursts = 0.0, drawn.expovariate(1 / CALM_S), False
    while True:
        step = drawn.expovariate(calm_per_s * (BURST_FACTOR if bursts else 1.0))
        if now + step >= ends:
            now, bursts = ends, not bursts
            ends = now + drawn.expovariate(1 / (BURST_S if bursts else CALM_S))
            continue
        now += step
        yield now


ARRIVALS: Mapping[str, Callable[[random.Random, float], Times]] = {
    "poisson": poisson,
    "diurnal": diurnal,
    "bursty": bursty,
}


def make_trace(
    world: World,
    arrivals: str,
    *,
    num_requests: int,
    utilisation: float = 0.6,
    skew: float = 1.0,
    seed: int = 1,
) -> list[Arrival]:
    """Return ``iter_trace`` as a list."""
    return list(
        iter_trace(
            world,
            arrivals,
            num_requests=num_requests,
            utilisation=utilisation,
            skew=skew,
            seed=seed,
        )
    )


def iter_trace(
    world: World,
    arrivals: str,
    *,
    num_requests: int,
    utilisation: float = 0.6,
    skew: float = 1.0,
    seed: int = 1,
) -> Iterator[Arrival]:
    """Yield requests at a share of what the world's warm replicas can do.

    Args:
        world: Where the data of some of them lies.
        arrivals: A key of ``ARRIVALS``.
        num_requests: How many.
        utilisation: Mean rate over the rate that saturates the warm replicas.
        skew: Exponent of Zipf's law over projects, beginnings of prompts and homes of data; 0 is
            uniform.
        seed: Of everything that is drawn.
    """
    drawn = random.Random(seed)  # noqa: S311
    times = ARRIVALS[arrivals](drawn, utilisation * world.rows_per_s)
    projects = [f"project-{number}" for number in range(NUM_PROJECTS)]
    pick_project = _zipf(drawn, NUM_PROJECTS, skew)
    pick_prefix = _zipf(drawn, NUM_PREFIXES, skew)
    homes = drawn.sample(world.sites, len(world.sites))
    pick_home = _zipf(drawn, len(homes), skew)
    for number in range(num_requests):
        prefix = pick_prefix()
        begins = drawn.random() < 0.5
        prompt_tokens = min(6_000, 20 + int(drawn.lognormvariate(5.0, 0.8)))
        output_tokens = max(8, min(400, int(drawn.lognormvariate(4.2, 0.7))))
        text = f"{number:012d}" + "x" * (4 * prompt_tokens)
        if begins:
            text = f"{prefix:08d}" * (PREFIX_TOKENS // 2) + text
            prompt_tokens += PREFIX_TOKENS
        data: dict[str, object] = {}
        if drawn.random() < 0.3:
            data = {
                "data_site": homes[pick_home()].name,
                "data_bytes": int(drawn.lognormvariate(math.log(200e6), 1.0)),
            }
        wanted = int(output_tokens * drawn.choice([1.0, 1.5, 2.0]))
        request = Request.model_validate(
            {
                "id": f"run_{seed}_{number}",
                "model": "simulated",
                "input": TextInput(text=text),
                "sampling": Sampling(max_tokens=wanted, temperature=0.0),
                "deadline_s": 120.0,
                **data,
            }
        )
        yield Arrival(
            at_s=next(times),
            request=request,
            project=projects[pick_project()],
            prefix=prefix if begins else -1,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            alone_s=prompt_tokens / 4_000 + output_tokens / 40,
        )


def _zipf(drawn: random.Random, number: int, skew: float) -> Callable[[], int]:
    summed = list(accumulate(1.0 / (rank + 1) ** skew for rank in range(number)))
    choices = range(number)
    return lambda: drawn.choices(choices, cum_weights=summed)[0]
