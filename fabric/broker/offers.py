"""What all sites offer, in columns, so that a choice among many sites asks none of them singly.

Shapes: S sites that offer something.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from fabric.broker.facts import Offer
from fabric.broker.pool import Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Offers of one request.

    Args:
        sites: Their sites.
        price_su_S: The expected charge in service units, times what one counts there; shape (S,).
        odd: Positions of the sites that may have to be left out: there is no allocation, it has
            too little, the site has maintenance planned or takes so many requests at once.
    """

    sites: tuple[str, ...]
    price_su_S: Floats
    odd: tuple[int, ...]


class Offers(Mapping[str, Offer]):
    """Offers by site; their columns are made once, for all choices of a request.

    Args:
        offers: By site.
    """

    def __init__(self, offers: Mapping[str, Offer]) -> None:
        self._offers = offers
        self._columns: Columns | None = None

    def __getitem__(self, site: str) -> Offer:
        return self._offers[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self._offers)

    def __len__(self) -> int:
        return len(self._offers)

    @property
    def columns(self) -> Columns:
        """The same in vectors."""
        if self._columns is None:
            offers = self._offers.values()
            prices_su = [one.price_su for one in offers]
            self._columns = Columns(
                sites=tuple(self._offers),
                price_su_S=np.array(prices_su),
                odd=tuple(number for number, one in enumerate(offers) if _is_odd(one)),
            )
        return self._columns


def as_offers(offers: Mapping[str, Offer]) -> Offers:
    """Return the offers in columns."""
    return offers if isinstance(offers, Offers) else Offers(offers)


def _is_odd(offer: Offer) -> bool:
    return (
        offer.allocation is None
        or offer.available_usu < offer.max_charge_usu
        or offer.max_in_flight is not None
        or bool(offer.closures)
    )
