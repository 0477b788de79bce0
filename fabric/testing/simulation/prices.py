"""What a request costs at all sites at once: ``fabric.ledger.charge_usu`` in vectors.

Shapes: S sites.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from fabric.broker.facts import Offer
from fabric.broker.offers import Columns, Offers
from fabric.ledger import Rate

AVAILABLE_USU = 10**15
PARTS = 1_000_000
"""Prices have at most six decimal places."""


class Prices:
    """The prices of the sites, of the standard tier and without caches."""

    def __init__(self, rates: Mapping[str, Rate]) -> None:
        self._positions = {site: number for number, site in enumerate(rates)}
        self._prompt_S = np.array([int(one.prompt_usu * PARTS) for one in rates.values()], np.int64)
        self._output_S = np.array([int(one.output_usu * PARTS) for one in rates.values()], np.int64)

    def charge_usu(self, prompt_tokens: int, output_tokens: int) -> list[int]:
        """Return the charge at each site, in micro-SU, rounded up."""
        parts_S = self._prompt_S * prompt_tokens + self._output_S * output_tokens
        charges: list[int] = (-(-parts_S // PARTS)).tolist()
        return charges

    def offers(self, allocation: str, bound: tuple[int, int], likely: tuple[int, int]) -> Quotes:
        """Return what each site offers, by the most and the likely tokens of prompt and output."""
        return Quotes(
            self._positions, allocation, self.charge_usu(*bound), self.charge_usu(*likely)
        )


class Quotes(Offers):
    """Offers that are made when somebody asks for one; the choice asks for columns alone.

    Args:
        positions: Of each site.
        allocation: Who pays everywhere.
        most_usu: The largest charges.
        likely_usu: The expected charges.
    """

    def __init__(
        self,
        positions: Mapping[str, int],
        allocation: str,
        most_usu: list[int],
        likely_usu: list[int],
    ) -> None:
        self._positions = positions
        self._allocation = allocation
        self.most_usu = most_usu
        self._likely_usu = likely_usu
        sites, price_su_S = tuple(positions), np.array(likely_usu) / 1e6
        self._columns = Columns(sites=sites, price_su_S=price_su_S, odd=())

    def __getitem__(self, site: str) -> Offer:
        position = self._positions[site]
        return Offer(
            site=site,
            allocation=self._allocation,
            available_usu=AVAILABLE_USU,
            max_charge_usu=self.most_usu[position],
            expected_charge_usu=self._likely_usu[position],
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._positions)

    def __len__(self) -> int:
        return len(self._positions)
