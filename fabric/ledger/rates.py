"""Prices, and the one place where quantities become money.

A charge is ``tier x sum(price x quantity)``, computed exactly and rounded up to a whole micro-SU
once, at the end. A request pays for its uncached and cached prompt tokens, output tokens and the
seconds it keeps blocks of the KV cache; with an adapter also for the seconds it has that one's
slot; an intervention program also for bytes in and out and for seconds of computing. What is stored
is charged by the day.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from decimal import Decimal, localcontext
from fractions import Fraction
from math import ceil, isfinite
from types import MappingProxyType
from typing import Final, NotRequired, TypedDict

from sqlalchemy import Connection, Row, bindparam, delete, insert, select

from fabric.errors import NotFound, RateMissing, RequestInvalid
from fabric.ledger.tables import rates
from fabric.messages import Usage

TIERS: Final[Mapping[str, Decimal]] = MappingProxyType(
    {"interactive": Decimal("1.5"), "standard": Decimal(1), "batch": Decimal("0.5")}
)
"""What each tier multiplies a charge by."""

MILLION = 1_000_000
HOUR_S = 3_600
_MAX_PER_MILLION = 10**15

KV_BLOCK_TOKENS = 16
"""The tokens of a block of the KV cache, as it is priced."""

_COLUMNS = {
    "prompt_usu": "prompt_usu_per_mtoken",
    "cached_prompt_usu": "cached_prompt_usu_per_mtoken",
    "output_usu": "output_usu_per_mtoken",
    "hook_in_usu": "hook_in_usu_per_mbyte",
    "hook_out_usu": "hook_out_usu_per_mbyte",
    "device_usu": "device_usu_per_million_s",
    "kv_block_usu": "kv_block_usu_per_million_s",
    "adapter_usu": "adapter_usu_per_million_h",
    "fine_tune_usu": "fine_tune_usu_per_million_s",
    "stored_usu": "stored_usu_per_million_gib_day",
}
"""Where each price is kept, in whole micro-SU per million."""

PRICES = tuple(_COLUMNS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """Prices from a time on, in micro-SU, with at most six decimal places.

    Attributes:
        model: Which row matched; ``*`` is a default.
        site: Likewise.
        effective_from: From when on.
        prompt_usu: For an uncached prompt token.
        cached_prompt_usu: For a cached prompt token.
        output_usu: For a generated token.
        hook_in_usu: For a byte of a program's constants.
        hook_out_usu: For a byte that a program saved.
        device_usu: For a second that a program computed.
        kv_block_usu: For a second that a block of the KV cache (16 tokens) is kept.
        adapter_usu: For an hour that an adapter's slot is used in an instance.
        fine_tune_usu: For a second of a device that trains.
        stored_usu: For a day that a GiB is stored.
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
    kv_block_usu: Decimal = Decimal(0)
    adapter_usu: Decimal = Decimal(0)
    fine_tune_usu: Decimal = Decimal(0)
    stored_usu: Decimal = Decimal(0)


class Prices(TypedDict):
    """The prices of a rate; see ``Rate``."""

    prompt_usu: int | Decimal
    cached_prompt_usu: int | Decimal
    output_usu: int | Decimal
    hook_in_usu: NotRequired[int | Decimal]
    hook_out_usu: NotRequired[int | Decimal]
    device_usu: NotRequired[int | Decimal]
    kv_block_usu: NotRequired[int | Decimal]
    adapter_usu: NotRequired[int | Decimal]
    fine_tune_usu: NotRequired[int | Decimal]
    stored_usu: NotRequired[int | Decimal]


def price_usu(
    rate: Rate,
    tier: str,
    quantities: Mapping[str, float | Decimal],
    *,
    factors: Mapping[str, Decimal] = TIERS,
) -> int:
    """Return what quantities cost, in micro-SU. Those that are no integers are rounded up to a
    millionth.

    Args:
        rate: The prices.
        tier: A key of ``TIERS``.
        quantities: How much of what each of ``PRICES`` is for.
        factors: What each tier multiplies a charge by, where that is not the release's.

    Raises:
        RequestInvalid: A quantity is negative or not finite.
    """
    with localcontext(prec=64):  # exact: whatever the price and the count
        total = Decimal(0)
        for name, quantity in quantities.items():
            if not quantity:
                continue
            is_whole = isinstance(quantity, int)
            if not (is_whole or isfinite(quantity)) or quantity < 0:
                reason = "a quantity is a number from 0 on"
                raise RequestInvalid(param=name, value=str(quantity), reason=reason)
            total += getattr(rate, name) * (quantity if is_whole else _millionths(quantity))
        return ceil(factors[tier] * total)


def charge_usu(
    rate: Rate,
    tier: str,
    usage: Usage,
    *,
    device_s: float = 0.0,
    factors: Mapping[str, Decimal] = TIERS,
) -> int:
    """Return what a usage costs, in micro-SU.

    Cached tokens beyond the prompt's own (a site's false report) are not priced.

    Args:
        rate: The prices.
        tier: A key of ``TIERS``.
        usage: What was used.
        device_s: Seconds of computing that are priced: a program's, and no others'.
        factors: See ``price_usu``.
    """
    cached = min(usage.cached_prompt_tokens, usage.prompt_tokens)
    quantities = {
        "prompt_usu": usage.prompt_tokens - cached,
        "cached_prompt_usu": cached,
        "output_usu": usage.output_tokens,
        "hook_in_usu": usage.hook_bytes_in,
        "hook_out_usu": usage.hook_bytes_out,
        "device_usu": device_s,
        "kv_block_usu": usage.kv_block_s,
        "adapter_usu": usage.adapter_s / HOUR_S,
    }
    return price_usu(rate, tier, quantities, factors=factors)


def max_charge_usu(
    rate: Rate,
    tier: str,
    prompt_tokens_bound: int,
    max_output_tokens: int,
    *,
    hook_bytes_in: int = 0,
    hook_bytes_out: int = 0,
    device_s: float = 0.0,
    kv_block_s: float = 0.0,
    adapter_s: float = 0.0,
    factors: Mapping[str, Decimal] = TIERS,
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
        kv_block_s: The most block-seconds it can keep; see ``kv_block_s_bound``.
        adapter_s: The most seconds it can use an adapter's slot.
        factors: See ``price_usu``.
    """
    dearer = max(rate.prompt_usu, rate.cached_prompt_usu)
    quantities = {
        "prompt_usu": prompt_tokens_bound,
        "output_usu": max_output_tokens,
        "hook_in_usu": hook_bytes_in,
        "hook_out_usu": hook_bytes_out,
        "device_usu": device_s,
        "kv_block_usu": kv_block_s,
        "adapter_usu": adapter_s / HOUR_S,
    }
    return price_usu(replace(rate, prompt_usu=dearer), tier, quantities, factors=factors)


def kv_block_s_bound(num_rows: int, row_tokens: int, seconds: float) -> float:
    """Return the most block-seconds that rows of so many tokens can keep in a time."""
    return num_rows * ceil(row_tokens / KV_BLOCK_TOKENS) * seconds


def insert_rate(connection: Connection, rate: Rate) -> None:
    """Store a rate."""
    prices = {column: to_million(name, getattr(rate, name)) for name, column in _COLUMNS.items()}
    where = {"model": rate.model, "site": rate.site, "effective_from": rate.effective_from}
    connection.execute(insert(rates), where | prices)


def delete_rate(
    connection: Connection, model: str, site: str, effective_from: datetime, now: datetime
) -> None:
    """Take back a rate that is not in effect yet. See ``Ledger.delete_rate``."""
    if effective_from <= now:
        reason = "it is in effect, and charges rest on it; set another one to follow it"
        raise RequestInvalid(param="effective_from", value=str(effective_from), reason=reason)
    deleted = connection.execute(
        delete(rates).where(
            rates.c.model == model,
            rates.c.site == site,
            rates.c.effective_from == effective_from,
        )
    )
    if not deleted.rowcount:
        raise NotFound(kind="rate", name=f"{model} at {site} from {effective_from.isoformat()}")


def listed(connection: Connection) -> list[Rate]:
    """Return every rate, the newest of each model and site first."""
    order = (rates.c.model, rates.c.site, rates.c.effective_from.desc())
    return [_to_rate(row) for row in connection.execute(select(rates).order_by(*order))]


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
    return _to_rate(row)


def to_million(param: str, price: Decimal) -> int:
    """Return a price as whole micro-SU per million.

    Raises:
        RequestInvalid: It is negative, over 1e9 or too finely divided.
    """
    exact = Fraction(price) * MILLION if price.is_finite() else Fraction(-1)
    if exact.denominator != 1 or not 0 <= exact <= _MAX_PER_MILLION:
        raise RequestInvalid(
            param=param,
            value=str(price),
            reason="a price is 0 to 1e9 micro-SU a unit, with at most six decimal places",
        )
    return int(exact)


def _to_rate(row: Row[tuple[object, ...]]) -> Rate:
    columns = row._mapping
    prices = {name: Decimal(columns[column]) / MILLION for name, column in _COLUMNS.items()}
    return Rate(model=row.model, site=row.site, effective_from=row.effective_from, **prices)


def _millionths(quantity: float | Decimal) -> Decimal:
    return Decimal(ceil(quantity * MILLION)) / MILLION
