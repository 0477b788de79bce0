"""What a request's admission rests on: prices, balances and sites, read no oftener than needed."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from fabric.auth import Decision, Permits, Rulebook, get_modes
from fabric.broker.programs import ProgramBounds
from fabric.broker.select import Closure
from fabric.broker.settings import BrokerSettings
from fabric.catalog import Catalog, ModelVersion, SiteRules
from fabric.errors import DataStays, NotGranted, RateMissing, UnknownModel, UnknownSite
from fabric.ledger import AllocationBalance, Ledger, Rate
from fabric.messages import Request
from fabric.sql import utc_now
from fabric.sql.offload import Offload

BURN_TTL_S = 600.0
"""How old the rate at which a project spends may be."""

STALE_FACTOR = 5
"""How many times their lifetime facts may serve while newer ones are being read."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the database says about one project's use of one model, at one moment.

    ``rates`` has the enabled sites that have a price; ``sites`` all that the caller may know of, by
    the rules of ``rules_version``, and ``hidden`` the other sites and the digests of other models.
    ``closures`` are the sites' maintenance by the broker's clock, ``max_in_flight`` their limits
    where they have any, and ``burns`` what each allocation is charged a day. ``own`` are the sites
    of the caller's own, and whether they keep requests; ``usual_rate`` is the price where a site
    has none of its own.
    """

    version: ModelVersion
    sites: tuple[str, ...]
    rates: Mapping[str, Rate]
    allocations: tuple[AllocationBalance, ...]
    hidden: frozenset[str]
    rules_version: int
    read_at: float
    read_on: datetime
    max_in_flight: Mapping[str, int | None] = field(default_factory=dict)
    closures: Mapping[str, tuple[Closure, ...]] = field(default_factory=dict)
    burns: Mapping[str, float] = field(default_factory=dict)
    own: Mapping[str, bool] = field(default_factory=dict)
    usual_rate: Rate | None = None

    def days_left(self, allocation: AllocationBalance | None) -> float | None:
        """Return the days until an allocation ends, if it does."""
        if allocation is None or allocation.ends_at is None:
            return None
        return (allocation.ends_at - self.read_on) / timedelta(days=1)


class Records:
    """Reads facts on the database's thread, and keeps them for a moment.

    Args:
        ledger: Prices and balances.
        catalog: Models and sites.
        offload: The database's thread.
        settings: How old facts may be.
        rules: By whose version facts are known to be old.
    """

    def __init__(
        self,
        *,
        ledger: Ledger,
        catalog: Catalog,
        offload: Offload,
        settings: BrokerSettings,
        rules: Rulebook,
    ) -> None:
        self._ledger = ledger
        self._catalog = catalog
        self._offload = offload
        self._settings = settings
        self._rules = rules
        self._facts: dict[tuple[str, str, str], Facts] = {}
        self._burns: dict[str, tuple[float, Mapping[str, float]]] = {}
        self._reading: dict[tuple[str, str, str], asyncio.Future[Facts]] = {}

    async def recent(self, permits: Permits, model: str) -> Facts:
        """Return facts read within ``facts_ttl_s``, or a little older while newer ones are read."""
        key = (permits.project, permits.key_id, model)
        facts = self._facts.get(key)
        if facts is not None and facts.rules_version != self._rules.known.version:
            facts = None
        age_s = math.inf if facts is None else time.monotonic() - facts.read_at
        if facts is not None and age_s < self._settings.facts_ttl_s:
            return facts
        reading = self._reading.get(key)
        if reading is None:
            reading = self._reading[key] = asyncio.ensure_future(self.read(permits, model))
            reading.add_done_callback(lambda _: self._reading.pop(key))
        if facts is not None and age_s < STALE_FACTOR * self._settings.facts_ttl_s:
            reading.add_done_callback(_heard)
            return facts
        return await asyncio.shield(reading)

    async def read(self, permits: Permits, model: str) -> Facts:
        """Return facts as they are now."""
        facts = await self._offload(self._query, permits, model, self._rules.known.version)
        self._facts[permits.project, permits.key_id, model] = facts
        return facts

    def _query(self, permits: Permits, model: str, rules_version: int) -> Facts:
        seen = self._catalog.seen_by(permits)
        version, everywhere = seen.resolve(model), self._catalog.sites()
        sites = [site for site in everywhere if seen.shows(site)]
        hidden = {site.name for site in everywhere} - {site.name for site in sites}
        if permits.models:
            hidden |= _digests(self._catalog.models()) - _digests(seen.models())
        rates = {}
        for site in sites:
            if site.state == "enabled":
                try:
                    rates[site.name] = self._ledger.rate(version.ref, site.name)
                except RateMissing:
                    continue
        usual_rate = None
        with suppress(RateMissing):
            usual_rate = self._ledger.rate(version.ref, "*")
        now, now_s = utc_now(), time.monotonic()
        site_rules = {site.name: site.rules for site in sites}
        return Facts(
            version=version,
            sites=tuple(site.name for site in sites),
            rates=rates,
            allocations=tuple(self._ledger.payers(permits.project, permits.key_id)),
            hidden=frozenset(hidden),
            rules_version=rules_version,
            read_at=now_s,
            read_on=now,
            max_in_flight={site: one.max_in_flight for site, one in site_rules.items()},
            closures={site: tuple(_closures(one, now, now_s)) for site, one in site_rules.items()},
            burns=self._burn(permits.project),
            own={
                site.name: site.own.keeps
                for site in sites
                if site.own is not None and site.own.belongs_to(permits.project, permits.key_id)
            },
            usual_rate=usual_rate,
        )

    def _burn(self, project: str) -> Mapping[str, float]:
        """Return how fast the project's allocations are spent; read seldom, for it takes long."""
        read_at, burns = self._burns.get(project, (-math.inf, {}))
        now_s = time.monotonic()
        if now_s - read_at >= BURN_TTL_S:
            burns = self._ledger.burn(project)
            self._burns[project] = now_s, burns
        return burns


def get_permitted(
    request: Request, facts: Facts, permits: Permits, bounds: ProgramBounds | None
) -> tuple[str, ...]:
    """Return where a request may run: of the sites it asks for, those where it is allowed.

    Raises:
        UnknownModel: The model is hidden from the caller.
        UnknownSite: A site that it names is hidden, or not there.
        DataStays: Data of the project may go to none of them.
        NotGranted: It is allowed at none of them.
    """
    name = facts.version.name
    if not permits.sees_model(name):
        raise UnknownModel(model=request.model, known=())
    sites = [site for site in facts.sites if permits.sees_site(site)]
    for site in (*(request.sites or ()), *filter(None, [request.data_site])):
        if site not in sites:
            raise UnknownSite(site=site, known=sites)
    modes = get_modes(request, () if bounds is None else bounds.scopes)
    asked = tuple(sites) if request.sites is None else request.sites
    allowed = tuple(
        site
        for site in asked
        if permits.decide(model=name, site=site, modes=modes, tier=request.tier) is Decision.ALLOWED
    )
    if asked and permits.homes is not None and permits.homes.isdisjoint(asked):
        homes = [site for site in sites if site in permits.homes]
        raise DataStays(project=permits.project, homes=homes, asked=asked)
    if asked and not allowed:
        raise NotGranted(
            project=permits.project,
            model=name,
            modes=sorted(modes),
            tier=request.tier,
            sites=request.sites or (),
        )
    return allowed


def _digests(versions: Iterable[ModelVersion]) -> set[str]:
    return {version.digest for version in versions if version.digest is not None}


def _closures(rules: SiteRules, now: datetime, now_s: float) -> Iterator[Closure]:
    for one in rules.maintenance:
        if one.ends_at > now:
            yield Closure(
                begins_s=now_s + (one.starts_at - now).total_seconds(),
                ends_s=now_s + (one.ends_at - now).total_seconds(),
                until=one.ends_at.astimezone(UTC),
            )


def _heard(reading: asyncio.Future[Facts]) -> None:
    """A reading that nobody waits for failed; the next request that needs it will say so."""
    if not reading.cancelled() and reading.exception() is not None:
        logger.info("prices and balances not read", exc_info=reading.exception())
