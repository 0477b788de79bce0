"""What a request costs at all sites at once: ``fabric.ledger.charge_usu`` in vectors.

Shapes: S sites.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from fabric.broker.facts import Offer
from fabric.broker.offers import Columns, Offers
from fabric.ledger import Rate

AVAILABLE_USU = 10**15
PARTS = 1_000_000
"""Prices have at most six decimal places."""

Tokens = tuple[int, int]
"""Of the prompt and of the output."""
Charges = NDArray[np.int64]


class Prices:
    """The prices of the sites, of the standard tier and without caches."""

    def __init__(self, rates: Mapping[str, Rate]) -> None:
        self.sites = tuple(rates)
        self.positions = {site: number for number, site in enumerate(rates)}
        self._prompt_S = np.array([int(one.prompt_usu * PARTS) for one in rates.values()], np.int64)
        self._output_S = np.array([int(one.output_usu * PARTS) for one in rates.values()], np.int64)

    def charge_usu(self, tokens: Tokens) -> Charges:
        """Return the charge at each site, in micro-SU, rounded up; shape (S,)."""
        parts_S = self._prompt_S * tokens[0] + self._output_S * tokens[1]
        return -(-parts_S // PARTS)

    def highest_usu(self, tokens: Tokens) -> int:
        """Return the charge at the dearest site, in micro-SU."""
        return int(self.charge_usu(tokens).max())

    def offers(self, allocation: str, bound: Tokens, likely: Tokens) -> Quotes:
        """Return what each site offers, by the most and the likely tokens."""
        return Quotes(self, allocation, bound, likely)


class Quotes(Offers):
    """Offers that are made when somebody asks for one; the choice asks for columns alone.

    Tens of thousands of them are there at once, so they keep no vectors.

    Args:
        prices: Of the sites.
        allocation: Who pays everywhere.
        bound: The most tokens of prompt and output.
        likely: The expected ones.
    """

    def __init__(self, prices: Prices, allocation: str, bound: Tokens, likely: Tokens) -> None:
        self._prices = prices
        self._allocation = allocation
        self._bound = bound
        self._likely = likely

    def __getitem__(self, site: str) -> Offer:
        position = self._prices.positions[site]
        return Offer(
            site=site,
            allocation=self._allocation,
            available_usu=AVAILABLE_USU,
            max_charge_usu=int(self._prices.charge_usu(self._bound)[position]),
            expected_charge_usu=int(self._prices.charge_usu(self._likely)[position]),
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._prices.sites)

    def __len__(self) -> int:
        return len(self._prices.sites)

    @property
    def columns(self) -> Columns:
        """The same in vectors."""
        price_su_S = self._prices.charge_usu(self._likely) / 1e6
        return Columns(sites=self._prices.sites, price_su_S=price_su_S, odd=())
