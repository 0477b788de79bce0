"""What a request costs at all sites at once: ``fabric.ledger.charge_usu`` in vectors.

Shapes: S sites.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fabric.broker.select import Offer
from fabric.ledger import Rate

AVAILABLE_USU = 10**15
PARTS = 1_000_000
"""Prices have at most six decimal places."""


class Prices:
    """The prices of the sites, of the standard tier and without caches."""

    def __init__(self, rates: Mapping[str, Rate]) -> None:
        self._sites = list(rates)
        self._prompt_S = np.array([int(one.prompt_usu * PARTS) for one in rates.values()], np.int64)
        self._output_S = np.array([int(one.output_usu * PARTS) for one in rates.values()], np.int64)

    def charge_usu(self, prompt_tokens: int, output_tokens: int) -> list[int]:
        """Return the charge at each site, in micro-SU, rounded up."""
        parts_S = self._prompt_S * prompt_tokens + self._output_S * output_tokens
        charges: list[int] = (-(-parts_S // PARTS)).tolist()
        return charges

    def offers(
        self, allocation: str, bound: tuple[int, int], likely: tuple[int, int]
    ) -> dict[str, Offer]:
        """Return what each site offers, by the most and the likely tokens of prompt and output."""
        charges = zip(self._sites, self.charge_usu(*bound), self.charge_usu(*likely), strict=True)
        return {
            site: Offer(
                site=site,
                allocation=allocation,
                available_usu=AVAILABLE_USU,
                max_charge_usu=most_usu,
                expected_charge_usu=likely_usu,
            )
            for site, most_usu, likely_usu in charges
        }
