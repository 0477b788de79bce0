"""What the accounts have left that pay for instances which users bring, as their launchers tell.

A centre charges for a job, not for what the job serves, so a request costs such an account nothing
more. But where it has too little for all that was asked of it, what can go elsewhere should.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fabric.broker.facts import MAX_SCARCITY

MEMORY_S = 3_600.0
"""What nobody has told again for so long is not known any more."""
MAX_ACCOUNTS = 8
"""Of one site; the newest count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """An account of a centre's.

    Args:
        name: The centre's name for it.
        unit: What the centre counts in.
        available: What it has left; negative where it is overdrawn.
        needed: What jobs that were asked for may still take, where that is known in this unit.
        asked_at: When the centre was asked, by the broker's clock.
    """

    name: str
    unit: str
    available: float
    needed: float | None
    asked_at: float

    @property
    def shortfall(self) -> float:
        """What lacks, as a part of what there is: 0 where it lasts."""
        if self.needed is None or self.needed <= self.available:
            return 0.0
        if self.available <= 0:
            return MAX_SCARCITY
        return min(MAX_SCARCITY, self.needed / self.available - 1)


class OwnAccounts:
    """The accounts that pay for users' own instances, by site."""

    def __init__(self) -> None:
        self._accounts: dict[str, dict[str, Account]] = {}

    def tell(self, site: str, account: Account) -> None:
        """Note what an account has left; an older answer of the centre's changes nothing."""
        known = self._accounts.setdefault(site, {})
        before = known.get(account.name)
        if before is not None and before.asked_at > account.asked_at:
            return
        known.pop(account.name, None)
        known[account.name] = account
        if len(known) > MAX_ACCOUNTS:
            del known[next(iter(known))]

    def of(self, site: str, now: float) -> list[Account]:
        """Return what is known of a site's accounts, what was told last first."""
        known = self._accounts.get(site)
        if known is None:
            return []
        for name in [one.name for one in known.values() if now - one.asked_at > MEMORY_S]:
            del known[name]
        if not known:
            del self._accounts[site]
        return list(reversed(known.values()))

    def shortfalls(self, sites: Iterable[str], now: float) -> Mapping[str, float]:
        """Return the largest shortfall of the accounts of each site where there is one."""
        if not self._accounts:
            return {}
        found = {
            site: max((one.shortfall for one in self.of(site, now)), default=0) for site in sites
        }
        return {site: shortfall for site, shortfall in found.items() if shortfall > 0}
