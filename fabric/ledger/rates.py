"""Prices, and the one place where usage becomes money.

A charge is ``tier x (uncached x prompt rate + cached x cached rate + output x output rate)``, and
of an intervention program also ``tier x (bytes in x hook-in rate + bytes out x hook-out rate +
device microseconds x device rate / 1,000,000)``; computed exactly and rounded up to a whole
micro-SU once, at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal, localcontext
from fractions import Fraction
from math import ceil
from types import MappingProxyType
from typing import Final

from sqlalchemy import Connection, bindparam, insert, select

from fabric.errors import RateMissing, RequestInvalid
from fabric.ledger.tables import rates
from fabric.messages import Usage

TIERS: Final[Mapping[str, Decimal]] = MappingProxyType(
    {"interactive": Decimal("1.5"), "standard": Decimal(1), "batch": Decimal("0.5")}
)
"""What each tier multiplies a charge by."""

MTOKEN = 1_000_000
_MAX_PER_MTOKEN = 10**15


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """Prices from a time on, in micro-SU per token, with at most six decimal places.

    ``model`` and ``site`` say which row matched; ``*`` is a default. Programs pay ``hook_in_usu``
    and ``hook_out_usu`` per byte and ``device_usu`` per second of computing, beside their tokens.
    """

    model: str
    site: str
    effective_from: datetime
    prompt_usu: Decimal
    cached_prompt_usu: Decimal
    output_usu: Decimal
    hook_in_usu: Decimal = Decimal(0)
    hook_out_usu: Decimal = Decimal(0)
    device_usu: Decimal = Decimal(0)


def charge_usu(rate: Rate, tier: str, usage: Usage, *, device_s: float = 0.0) -> int:
    """Return what a usage costs, in micro-SU.

    Cached tokens beyond the prompt's own (a site's false report) are not priced.

    Args:
        rate: The prices.
        tier: A key of ``TIERS``.
        usage: What was used.
        device_s: Seconds of computing that are priced: a program's, and no others'.
    """
    cached = min(usage.cached_prompt_tokens, usage.prompt_tokens)
    return _total(
        tier,
        (rate.prompt_usu, usage.prompt_tokens - cached),
        (rate.cached_prompt_usu, cached),
        (rate.output_usu, usage.output_tokens),
        *_hooks(rate, usage.hook_bytes_in, usage.hook_bytes_out, device_s),
    )


def max_charge_usu(
    rate: Rate,
    tier: str,
    prompt_tokens_bound: int,
    max_output_tokens: int,
    *,
    hook_bytes_in: int = 0,
    hook_bytes_out: int = 0,
    device_s: float = 0.0,
) -> int:
    """Return the most a request may cost, in micro-SU: what is held for it.

    Args:
        rate: The prices.
        tier: A key of ``TIERS``.
        prompt_tokens_bound: At least as many tokens as the prompt has.
        max_output_tokens: The most tokens generated, over all choices.
        hook_bytes_in: The most bytes a program is given.
        hook_bytes_out: The most bytes it may return.
        device_s: The most seconds of computing it is charged for.
    """
    return _total(
        tier,
        (max(rate.prompt_usu, rate.cached_prompt_usu), prompt_tokens_bound),
        (rate.output_usu, max_output_tokens),
        *_hooks(rate, hook_bytes_in, hook_bytes_out, device_s),
    )


def insert_rate(connection: Connection, rate: Rate) -> None:
    """Store a rate."""
    connection.execute(
        insert(rates),
        {
            "model": rate.model,
            "site": rate.site,
            "effective_from": rate.effective_from,
            "prompt_usu_per_mtoken": _to_mtoken("prompt_usu", rate.prompt_usu),
            "cached_prompt_usu_per_mtoken": _to_mtoken("cached_prompt_usu", rate.cached_prompt_usu),
            "output_usu_per_mtoken": _to_mtoken("output_usu", rate.output_usu),
            "hook_in_usu_per_mbyte": _to_mtoken("hook_in_usu", rate.hook_in_usu),
            "hook_out_usu_per_mbyte": _to_mtoken("hook_out_usu", rate.hook_out_usu),
            "device_usu_per_million_s": _to_mtoken("device_usu", rate.device_usu),
        },
    )


_EFFECTIVE = select(rates).where(
    rates.c.model.in_(bindparam("models", expanding=True)),
    rates.c.site.in_(bindparam("sites", expanding=True)),
    rates.c.effective_from <= bindparam("at"),
)


def find_rate(connection: Connection, model: str, site: str, at: datetime) -> Rate:
    """Return the newest rate in effect of the closest match.

    The model's version comes before its name and both before ``*``; for the same model the site
    comes before ``*``.

    Raises:
        RateMissing: None matches.
    """
    models = [*dict.fromkeys([model, model.partition("@")[0], "*"])]
    sites = [*dict.fromkeys([site, "*"])]
    found = connection.execute(_EFFECTIVE, {"models": models, "sites": sites, "at": at}).all()
    if not found:
        raise RateMissing(model=model, site=site)
    row = min(
        found,
        key=lambda row: (models.index(row.model), sites.index(row.site), at - row.effective_from),
    )
    return Rate(
        model=row.model,
        site=row.site,
        effective_from=row.effective_from,
        prompt_usu=_from_mtoken(row.prompt_usu_per_mtoken),
        cached_prompt_usu=_from_mtoken(row.cached_prompt_usu_per_mtoken),
        output_usu=_from_mtoken(row.output_usu_per_mtoken),
        hook_in_usu=_from_mtoken(row.hook_in_usu_per_mbyte),
        hook_out_usu=_from_mtoken(row.hook_out_usu_per_mbyte),
        device_usu=_from_mtoken(row.device_usu_per_million_s),
    )


def _hooks(
    rate: Rate, bytes_in: int, bytes_out: int, device_s: float
) -> tuple[tuple[Decimal, int], ...]:
    return (
        (rate.hook_in_usu, bytes_in),
        (rate.hook_out_usu, bytes_out),
        (rate.device_usu / MTOKEN, ceil(device_s * MTOKEN)),
    )


def _total(tier: str, *priced: tuple[Decimal, int]) -> int:
    with localcontext(prec=64):  # exact: whatever the price and the count
        return ceil(TIERS[tier] * sum((p * count for p, count in priced), Decimal(0)))


def _to_mtoken(name: str, price: Decimal) -> int:
    exact = Fraction(price) * MTOKEN if price.is_finite() else Fraction(-1)
    if exact.denominator != 1 or not 0 <= exact <= _MAX_PER_MTOKEN:
        raise RequestInvalid(
            param=name,
            value=str(price),
            reason="a price is 0 to 1e9 micro-SU a unit, with at most six decimal places",
        )
    return int(exact)


def _from_mtoken(amount_usu: int) -> Decimal:
    return Decimal(amount_usu) / MTOKEN
