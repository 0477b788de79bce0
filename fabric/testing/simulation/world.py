"""The sites of a simulation, their replicas and the links between them."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import Self

from fabric.ledger import Rate

DIGEST = "sha256:" + "0" * 64
CONTEXT_TOKENS = 32_768


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteSketch:
    """A site.

    Args:
        name: Its name.
        num_replicas: Instances of the model.
        max_rows: Rows each computes at once.
        prefill_tokens_per_s: Of a replica that does nothing else.
        decode_tokens_per_s: Of one row of such a replica.
        slowdown: How much longer a row takes in a full batch; 1 is twice as long.
        prompt_usu: Price of a prompt token, in micro-SU.
        output_usu: Price of an output token, in micro-SU.
        start_wait_s: Mean seconds in the scheduler's queue.
        load_s: Seconds to load the model.
        num_cold: Replicas that stop when idle and are started by a request.
        idle_s: When they stop.
        mtbf_s: Mean seconds until a replica is lost, if it ever is.
    """

    name: str
    num_replicas: int
    max_rows: int = 16
    prefill_tokens_per_s: float = 4_000.0
    decode_tokens_per_s: float = 40.0
    slowdown: float = 1.0
    prompt_usu: float = 1.0
    output_usu: float = 10.0
    start_wait_s: float = 60.0
    load_s: float = 30.0
    num_cold: int = 0
    idle_s: float = 120.0
    mtbf_s: float | None = None

    @property
    def rows_per_s(self) -> float:
        """Requests of 400 and 90 tokens that the site's warm replicas finish in a second."""
        alone_s = 400 / self.prefill_tokens_per_s + 90 / self.decode_tokens_per_s
        warm = self.num_replicas - self.num_cold
        return warm * self.max_rows / (alone_s * (1.0 + self.slowdown))

    def priced(self, factor: float) -> Self:
        """Return the site at its prices times a factor."""
        prompt_usu, output_usu = self.prompt_usu * factor, self.output_usu * factor
        return replace(self, prompt_usu=round(prompt_usu, 4), output_usu=round(output_usu, 4))

    def rate(self) -> Rate:
        """Return its prices; what a replica computed before is at a quarter."""
        return Rate(
            model="*",
            site=self.name,
            effective_from=datetime(2026, 1, 1, tzinfo=UTC),
            prompt_usu=Decimal(str(self.prompt_usu)),
            cached_prompt_usu=Decimal(str(self.prompt_usu / 4)),
            output_usu=Decimal(str(self.output_usu)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Sites in the order of their registration, and bytes per second between them."""

    sites: tuple[SiteSketch, ...]
    bandwidth_bytes_per_s: float = 200e6
    bandwidths_bytes_per_s: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    cached_prefixes: int = 8
    """Beginnings of prompts that a replica keeps."""

    @property
    def rows_per_s(self) -> float:
        """Requests of average size that all warm replicas finish in a second."""
        return sum(site.rows_per_s for site in self.sites)

    def bandwidth(self, source: str, target: str) -> float:
        """Return the bytes per second from one site to another."""
        return self.bandwidths_bytes_per_s.get(source, {}).get(target, self.bandwidth_bytes_per_s)


def make_world(
    num_sites: int = 5, replicas_per_site: int = 8, *, seed: int = 1, mtbf_s: float | None = 3_600.0
) -> World:
    """Return sites as unlike as centres are: speed, price, size, queue and links.

    Fast hardware is dearer by the token, but not in proportion.
    """
    drawn = random.Random(seed)  # noqa: S311
    sites = []
    for index in range(num_sites):
        speed = drawn.choice([0.5, 0.75, 1.0, 1.5, 2.0])
        price = speed**0.5 * drawn.uniform(0.6, 1.6)
        num_replicas = max(1, round(replicas_per_site * drawn.uniform(0.5, 1.5)))
        sites.append(
            SiteSketch(
                name=f"site-{index}",
                num_replicas=num_replicas,
                max_rows=drawn.choice([8, 16]),
                prefill_tokens_per_s=4_000 * speed,
                decode_tokens_per_s=40 * speed,
                slowdown=drawn.uniform(0.5, 1.5),
                prompt_usu=round(price, 3),
                output_usu=round(10 * price, 3),
                start_wait_s=drawn.expovariate(1 / 120),
                load_s=drawn.uniform(20, 60),
                num_cold=num_replicas // 4,
                mtbf_s=mtbf_s,
            )
        )
    names = [site.name for site in sites]
    links = {
        source: {
            target: drawn.choice([50e6, 200e6, 500e6, 1e9]) for target in names if source != target
        }
        for source in names
    }
    return World(sites=tuple(sites), bandwidths_bytes_per_s=links)
