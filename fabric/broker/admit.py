"""Admission: who may ask, what it may cost at most, and that amount held before it is sent."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Protocol, TypedDict

from fabric.auth import Decision, Identity, Permits, Rulebook, get_modes, require
from fabric.broker.lengths import Lengths
from fabric.broker.limits import Limiter, Standing, Turn
from fabric.broker.programs import MARGIN, ProgramBounds
from fabric.broker.select import MAX_SCARCITY, Closure, Context, Offer, expected_tokens
from fabric.broker.settings import BrokerSettings
from fabric.broker.signals import Ticket
from fabric.catalog import Catalog, ModelVersion, SiteRules
from fabric.errors import (
    ContextExceeded,
    FabricError,
    InsufficientBalance,
    LedgerError,
    NoReplica,
    NotFound,
    NotGranted,
    Overloaded,
    RateLimited,
    RateMissing,
    RequestInvalid,
    RequestOverLimit,
    TierNotHeld,
    UnknownModel,
    UnknownSite,
)
from fabric.ledger import (
    AllocationBalance,
    Ledger,
    Rate,
    charge_usu,
    kv_block_s_bound,
    max_charge_usu,
)
from fabric.messages import Placement, Request, TokensInput, Usage
from fabric.sql import utc_now
from fabric.sql.offload import Offload

Foresee = Callable[[Request, Context], Placement | None]
"""Returns where a request would go now, ``None`` if it would wait; raises ``NoReplica``."""

Also = Callable[[Ticket], None]
"""Runs on the database's thread."""

NOTHING_USED = Usage()

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
    where they have any, and ``burns`` what each allocation is charged a day.
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

    def days_left(self, allocation: AllocationBalance | None) -> float | None:
        """Return the days until an allocation ends, if it does."""
        if allocation is None or allocation.ends_at is None:
            return None
        return (allocation.ends_at - self.read_on) / timedelta(days=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Checked:
    """A request that may be asked, with its prices and bounds."""

    context: Context
    prompt_tokens_bound: int
    max_output_tokens: int


class FindAdapter(Protocol):
    """Finds the adapter that a request names; blocks."""

    def __call__(self, name: str, *, project: str, model: str) -> str:
        """Return its digest; raise if the project has none of this name for this version."""


class Admission:
    """Checks requests and holds their largest charge.

    Prices and balances may be up to ``facts_ttl_s`` old when a request is admitted, because the
    ledger itself decides the hold. No request is refused by anything but fresh ones. Grants and
    limits are never older than ``rules`` lets them be.
    """

    def __init__(
        self,
        *,
        ledger: Ledger,
        catalog: Catalog,
        offload: Offload,
        settings: BrokerSettings,
        rules: Rulebook,
        find_adapter: FindAdapter | None = None,
        lengths: Lengths | None = None,
    ) -> None:
        self._ledger = ledger
        self._catalog = catalog
        self._offload = offload
        self._settings = settings
        self._rules = rules
        self._find_adapter = find_adapter
        self._lengths = lengths
        self._limiter = Limiter()
        self._turns: dict[str, Turn] = {}
        self._facts: dict[tuple[str, str, str], Facts] = {}
        self._burns: dict[str, tuple[float, Mapping[str, float]]] = {}
        self._reading: dict[tuple[str, str, str], asyncio.Future[Facts]] = {}

    def enter(self, run_id: str, identity: Identity) -> None:
        """Count a request. Nothing is awaited, so that no limit can be overshot; the caller has
        just waited for the rules.

        Raises:
            TooManyRequests: As many are in flight as may be.
            RateLimited: The requests of a minute are used up.
        """
        limits = self._rules.known.limits_of(identity)
        self._turns[run_id] = self._limiter.enter(identity, limits)

    def leave(self, run_id: str, usage: Usage = NOTHING_USED) -> None:
        """A request that was counted is over, and has used so much."""
        if (turn := self._turns.pop(run_id, None)) is not None:
            self._limiter.leave(turn, usage.prompt_tokens + usage.output_tokens)

    @contextmanager
    def counted(self, identity: Identity) -> Iterator[None]:
        """Count a part of a request as one in flight.

        Raises:
            TooManyRequests: As many are in flight as may be.
        """
        limits = self._rules.known.limits_of(identity)
        turn = self._limiter.enter(identity, limits, num_requests=0)
        try:
            yield
        finally:
            self._limiter.leave(turn)

    def standing(self, identity: Identity) -> list[Standing]:
        """Return what is left of a caller's limits of requests and tokens."""
        return self._limiter.standing(self._rules.known.limits_of(identity))

    async def admit(
        self,
        identity: Identity,
        request: Request,
        foresee: Foresee,
        *,
        scope: str = "query",
        also: Also | None = None,
        bounds: ProgramBounds | None = None,
    ) -> Ticket:
        """Check a request, hold its largest charge and return its ticket.

        Args:
            identity: Who asks.
            request: What is asked.
            foresee: Where it would go.
            scope: The permission it takes, beside those of a program.
            also: What is written in the transaction of the hold, and refuses it by raising.
            bounds: Of a program, what it may take.

        Raises:
            PermissionDenied: The caller has not the permission.
            UnknownModel: The model is not in the catalog, or hidden from the caller.
            UnknownSite: A site is not in the catalog, or hidden from the caller.
            NotGranted: Nowhere may the caller use the private model, or the sites, so.
            RateLimited: The tokens of a minute could be overdrawn.
            RequestOverLimit: They could be by this request alone.
            NotFound: The project has no adapter of the name.
            AdapterInvalid: It was made for another version.
            ContextExceeded: Prompt and output cannot fit the context.
            RateMissing: Nobody set a price for the model at a site where it may run.
            InsufficientBalance: No allocation covers the largest charge.
            NoReplica: None can serve it, and no wait could help.
            Overloaded: It would have to wait for too long.
            TierNotHeld: Its tier's promise cannot be held.
        """
        _require(identity, scope, bounds)
        permits = await self._rules.permits(identity)
        try:
            facts = await self._recent(permits, request.model)
            return await self._admit(identity, permits, request, facts, foresee, also, bounds)
        except (NotGranted, RateLimited, RequestOverLimit, Overloaded, TierNotHeld):
            # Newer prices would not help, and who is refused must not cost much.
            raise
        except FabricError:
            facts = await self._read(permits, request.model)
            return await self._admit(identity, permits, request, facts, foresee, also, bounds)

    async def prospect(
        self, identity: Identity, request: Request, bounds: ProgramBounds | None = None
    ) -> Context:
        """Check a request and return what a choice for it rests on. Raises as ``admit`` does, but
        for the balance, which the choice weighs."""
        require(identity, "query" if bounds is None else "program:read")
        permits = await self._rules.permits(identity)
        facts = await self._read(permits, request.model)
        context = self._check(request, facts, permits, bounds).context
        await self._adapter_of(identity.project, request, facts.version.ref)
        return context

    async def _admit(
        self,
        identity: Identity,
        permits: Permits,
        request: Request,
        facts: Facts,
        foresee: Foresee,
        also: Also | None,
        bounds: ProgramBounds | None,
    ) -> Ticket:
        checked = self._check(request, facts, permits, bounds)
        adapter = await self._adapter_of(identity.project, request, facts.version.ref)
        offers = checked.context.offers
        affordable = [
            offer
            for offer in offers.values()
            if offer.allocation is not None and offer.available_usu >= offer.max_charge_usu
        ]
        if not affordable:
            raise _insufficient(identity.project, offers)
        placement = foresee(request, checked.context)
        if placement is None:
            offer = min(affordable, key=lambda one: (one.max_charge_usu, one.site))
        else:
            offer = offers[placement.site]
        ticket = Ticket(
            request=request,
            project=identity.project,
            key_id=identity.key_id,
            created_at=utc_now(),
            model=facts.version.ref,
            digest=checked.context.digest,
            adapter=adapter,
            offers=offers,
            rates=facts.rates,
            held_allocation=str(offer.allocation),
            held_usu=offer.max_charge_usu,
            prompt_tokens_bound=checked.prompt_tokens_bound,
            max_output_tokens=checked.max_output_tokens,
            bounds=bounds,
            hidden=facts.hidden,
        )
        num_tokens = checked.prompt_tokens_bound + request.sampling.n * checked.max_output_tokens
        limits = self._rules.known.limits_of(identity)
        self._limiter.reserve(self._turns[request.id], num_tokens, limits)
        await self._hold(ticket, also)
        return ticket

    async def _adapter_of(self, project: str, request: Request, model: str) -> str | None:
        if request.adapter is None:
            return None
        if self._find_adapter is None:
            raise NotFound(kind="adapter", name=request.adapter)
        find = partial(self._find_adapter, request.adapter, project=project, model=model)
        return await self._offload(find)

    async def _hold(self, ticket: Ticket, also: Also | None) -> None:
        hold = self._offload.urgent(self._open_hold, ticket, also)
        try:
            await hold
        except asyncio.CancelledError:
            # The caller left; what may have been held meanwhile goes back right after it.
            self._offload(self.void, ticket.request.id)
            raise

    def _open_hold(self, ticket: Ticket, also: Also | None) -> None:
        with self._offload.database.transaction():
            self._ledger.hold(
                ticket.request.id,
                allocation=ticket.held_allocation,
                amount_usu=ticket.held_usu,
                lease_s=self._settings.lease_s,
            )
            if also is not None:
                also(ticket)

    def void(self, hold_id: str) -> None:
        """Return a hold if there is one. Blocks; for the database's thread."""
        try:
            self._ledger.void(hold_id)
        except LedgerError as error:
            logger.info("nothing to void", extra={"run": hold_id, "code": error.code})

    # ---- checks ---------------------------------------------------------------------------------

    def _check(
        self, request: Request, facts: Facts, permits: Permits, bounds: ProgramBounds | None
    ) -> _Checked:
        version, sites = facts.version, _permitted(request, facts, permits, bounds)
        if request.mode == "program" and bounds is None:
            reason = "programs have a route of their own, which checks and bounds them"
            raise RequestInvalid(param="mode", value=request.mode, reason=reason)
        if bounds is None:
            prompt_tokens, output_tokens = _bounds(request, version.context_tokens)
        else:
            prompt_tokens, output_tokens = bounds.prompt_tokens, bounds.output_tokens
        offers = self._offers(request, facts, sites, prompt_tokens, output_tokens, bounds)
        if version.digest is None:
            raise NoReplica(model=version.ref, reasons={})
        context = Context(
            model=version.ref,
            digest=version.digest,
            offers=offers,
            remaining_s=request.deadline_s,
            settings=self._settings,
            now=time.monotonic(),
            hidden=facts.hidden,
        )
        return _Checked(
            context=context,
            prompt_tokens_bound=prompt_tokens,
            max_output_tokens=output_tokens,
        )

    def _offers(
        self,
        request: Request,
        facts: Facts,
        asked: tuple[str, ...],
        prompt_tokens: int,
        output_tokens: int,
        bounds: ProgramBounds | None,
    ) -> dict[str, Offer]:
        """Return what the request would cost at each site where it may run.

        Raises:
            NoReplica: It may run nowhere.
            RateMissing: At none of them is there a price.
        """
        allowed = asked
        if request.policy == "local-only":
            allowed = tuple(site for site in asked if site == request.data_site)
        if not allowed:
            why = f"the request's data may not leave {request.data_site}"
            raise NoReplica(model=facts.version.ref, reasons=dict.fromkeys(asked, why))
        n, tier = request.sampling.n, request.tier
        likely_prompt, likely_output = expected_tokens(request, self._lengths)
        likely = Usage(prompt_tokens=likely_prompt, output_tokens=n * likely_output)
        likely_device_s, most = 0.0, _Hooks()
        if bounds is not None:
            most = _Hooks(
                hook_bytes_in=bounds.hook_bytes_in,
                hook_bytes_out=bounds.hook_bytes_out,
                device_s=bounds.device_s,
            )
            likely = likely.model_copy(update={"output_tokens": output_tokens} | most)
            likely_device_s = bounds.device_s / MARGIN
        kept_s = kv_block_s_bound(n, prompt_tokens + output_tokens, request.deadline_s)
        total_usu = sum(one.available_usu for one in facts.allocations)
        offers = {}
        for site in allowed:
            if (rate := facts.rates.get(site)) is None:
                continue
            needed_usu = max_charge_usu(
                rate, tier, prompt_tokens, n * output_tokens, kv_block_s=kept_s, **most
            )
            payer = _payer(facts.allocations, site, needed_usu)
            available_usu = payer.available_usu if payer else 0
            offers[site] = Offer(
                site=site,
                allocation=payer.name if payer else None,
                available_usu=available_usu,
                max_charge_usu=needed_usu,
                expected_charge_usu=charge_usu(rate, tier, likely, device_s=likely_device_s),
                scarcity=min(MAX_SCARCITY, total_usu / max(1, available_usu)),
                burn_usu_per_day=None if payer is None else facts.burns.get(payer.name),
                days_left=facts.days_left(payer),
                max_in_flight=facts.max_in_flight.get(site),
                closures=facts.closures.get(site, ()),
            )
        if not offers:
            raise RateMissing(model=facts.version.ref, site=allowed[0])
        return offers

    # ---- facts ----------------------------------------------------------------------------------

    async def _recent(self, permits: Permits, model: str) -> Facts:
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
            reading = self._reading[key] = asyncio.ensure_future(self._read(permits, model))
            reading.add_done_callback(lambda _: self._reading.pop(key))
        if facts is not None and age_s < STALE_FACTOR * self._settings.facts_ttl_s:
            reading.add_done_callback(_heard)
            return facts
        return await asyncio.shield(reading)

    async def _read(self, permits: Permits, model: str) -> Facts:
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
        )

    def _burn(self, project: str) -> Mapping[str, float]:
        """Return how fast the project's allocations are spent; read seldom, for it takes long."""
        read_at, burns = self._burns.get(project, (-math.inf, {}))
        now_s = time.monotonic()
        if now_s - read_at >= BURN_TTL_S:
            burns = self._ledger.burn(project)
            self._burns[project] = now_s, burns
        return burns


class _Hooks(TypedDict, total=False):
    """What programs pay beside tokens."""

    hook_bytes_in: int
    hook_bytes_out: int
    device_s: float


def _permitted(
    request: Request, facts: Facts, permits: Permits, bounds: ProgramBounds | None
) -> tuple[str, ...]:
    """Return where a request may run: of the sites it asks for, those where it is allowed.

    Raises:
        UnknownModel: The model is hidden from the caller.
        UnknownSite: A site that it names is hidden, or not there.
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


def _require(identity: Identity, scope: str, bounds: ProgramBounds | None) -> None:
    for one in sorted({scope} if bounds is None else {scope, *bounds.scopes}):
        require(identity, one)


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


def _bounds(request: Request, context_tokens: int) -> tuple[int, int]:
    """Return the most tokens the prompt and one choice of output can have.

    Raises:
        ContextExceeded: They do not fit, which is known here of token prompts alone; of text the
            instance says it.
    """
    asked = request.sampling.max_tokens
    prompt_tokens = request.prompt_tokens_bound()
    if isinstance(request.input, TokensInput) and prompt_tokens + (asked or 0) > context_tokens:
        raise ContextExceeded(
            prompt_tokens=prompt_tokens, max_tokens=asked or 0, context_tokens=context_tokens
        )
    output_tokens = context_tokens if asked is None else min(asked, context_tokens)
    return min(prompt_tokens, context_tokens), output_tokens


def _payer(
    allocations: tuple[AllocationBalance, ...], site: str, needed_usu: int
) -> AllocationBalance | None:
    """Return the allocation that would pay: one that can, the site's own before the general."""
    usable = [one for one in allocations if one.site in (site, "*")]
    return min(
        usable,
        key=lambda one: (
            one.available_usu < needed_usu,
            one.site == "*",
            -one.available_usu,
            one.name,
        ),
        default=None,
    )


def _insufficient(project: str, offers: Mapping[str, Offer]) -> InsufficientBalance:
    best = max(offers.values(), key=lambda one: one.available_usu - one.max_charge_usu)
    return InsufficientBalance(
        account=best.allocation or f"allocation:{project}:*",
        needed_usu=best.max_charge_usu,
        available_usu=best.available_usu,
    )
