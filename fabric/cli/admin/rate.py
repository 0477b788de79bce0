"""``fabric-admin rate``."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from typing import Any

import click

from fabric.cli.admin.change import undoable_options
from fabric.cli.admin.database import (
    UTC_TIME,
    Books,
    confirm,
    database_options,
    day,
    warn_of_absent,
    yes_option,
)
from fabric.cli.admin.rate_measure import measure
from fabric.cli.admin.rate_unit import unit
from fabric.cli.options import Command
from fabric.cli.output import Column, Output, note
from fabric.errors import NotFound, RateMissing


class PriceType(click.ParamType):
    """SU per million tokens, which is micro-SU per token."""

    name = "SU"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> Decimal:
        """Return the price."""
        try:
            return Decimal(str(value))
        except InvalidOperation:
            self.fail(f"{value!r} is not a price, such as 10 or 0.25", param, ctx)


PRICE = PriceType()

_OPTIONS = {
    "prompt_usu": ("--prompt", "For prompt tokens."),
    "cached_prompt_usu": ("--cached-prompt", "For cached ones; as --prompt."),
    "output_usu": ("--output", "For generated tokens."),
    "hook_in_usu": ("--hook-in", "For a program's bytes in."),
    "hook_out_usu": ("--hook-out", "For its bytes out."),
    "device_usu": ("--device", "For a second it computes."),
    "kv_block_usu": ("--kv-block", "For a second that 16 tokens stay in a cache."),
    "adapter_usu": ("--adapter", "For an hour of an adapter's slot."),
    "fine_tune_usu": ("--fine-tune", "For a device's second of training."),
    "stored_usu": ("--stored", "For a day that a GiB is stored."),
}
_REQUIRED = ("prompt_usu", "output_usu")


def _dated_prices(function: Command) -> Command:
    """Add whose prices they are, an option for every one (``None`` if not given), and the time."""
    at = click.option("--from", "starts_at", type=UTC_TIME, help="From when on (UTC); now.")
    function = at(undoable_options(function))
    for name, (option, text) in reversed(_OPTIONS.items()):
        function = click.option(option, name, type=PRICE, help=text)(function)
    return click.argument("model")(click.argument("site")(function))


@click.group()
def rate() -> None:
    """What things cost, in SU per million; from a time on, until another price follows.

    \b
    Example:
      fabric-admin rate add '*' '*' --prompt 10 --cached-prompt 1 --output 40
    """


rate.add_command(measure)
rate.add_command(unit)


@rate.command()
@_dated_prices
def add(
    model: str, site: str, starts_at: datetime | None, books: Books, output: Output, **prices: Any
) -> None:
    """Set all prices for MODEL at SITE; * stands for all that have none of their own.

    \b
    Example:
      fabric-admin rate add smol@1 alpha --prompt 10 --output 40 --from 2027-01-01
    """
    for name in _REQUIRED:
        if prices[name] is None:
            raise click.UsageError(f"Missing option '{_OPTIONS[name][0]}'.")
    if prices["cached_prompt_usu"] is None:
        prices["cached_prompt_usu"] = prices["prompt_usu"]
    _set(model, site, starts_at, prices, books, output)


@rate.command()
@_dated_prices
def modify(
    model: str, site: str, starts_at: datetime | None, books: Books, output: Output, **prices: Any
) -> None:
    """Let new prices follow those of MODEL at SITE; what is not given stays as it is.

    \b
    Example:
      fabric-admin rate modify '*' alpha --output 50 --from 2027-01-01
    """
    at = starts_at or datetime.now(UTC)
    current = next(
        (
            one
            for one in books.ledger.rates()
            if (one.model, one.site) == (model, site) and one.effective_from <= at
        ),
        None,
    )
    if current is None:
        raise NotFound(kind="rate", name=f"{model} at {site}")
    known = {name: price for name, price in asdict(current).items() if name in _OPTIONS}
    given = {name: price for name, price in prices.items() if price is not None}
    _set(model, site, starts_at, known | given, books, output)


@rate.command()
@click.argument("model")
@click.argument("site")
@click.option("--from", "effective_from", type=UTC_TIME, required=True, help="Which one (UTC).")
@yes_option
@undoable_options
def delete(
    model: str, site: str, effective_from: datetime, yes: bool, books: Books, output: Output
) -> None:
    """Take back prices that are not in effect yet; charges rest on the others.

    \b
    Example:
      fabric-admin rate delete '*' alpha --from 2027-01-01 -y
    """
    what = f"the prices of {model} at {site} from {day(effective_from)}"
    confirm(f"Take back {what}?", yes=yes)
    books.ledger.delete_rate(model, site, effective_from)
    output.json({"deleted": what}) if output.is_json else note(f"Took back {what}.")


@rate.command()
@click.option("--model", "models", multiple=True, help="Only this one; repeatable.")
@click.option("--site", "sites", multiple=True, help="Only this one; repeatable.")
@click.option("--all", "everything", is_flag=True, help="All that were ever set.")
@database_options
def show(
    models: tuple[str, ...],
    sites: tuple[str, ...],
    everything: bool,
    books: Books,
    output: Output,
) -> None:
    """Show what each model costs at each site now, or every price there was and will be.

    \b
    Example:
      fabric-admin rate show --site alpha
    """
    if everything:
        rows = [(one.model, one.site, one) for one in books.ledger.rates()]
        rows = [
            row
            for row in rows
            if (not models or row[0] in models) and (not sites or row[1] in sites)
        ]
    else:
        rows = []
        refs = models or tuple(model.ref for model in books.catalog.models()) or ("*",)
        names = sites or tuple(site.name for site in books.catalog.sites()) or ("*",)
        for ref, name in ((ref, name) for ref in refs for name in names):
            try:
                rows.append((ref, name, books.ledger.rate(ref, name)))
            except RateMissing:
                note(f"There is no price for {ref} at {name}.")
    if output.is_json:
        output.json([{"model": ref, "site": name, "rate": rate} for ref, name, rate in rows])
        return
    # Prices that nobody has set take no room.
    kinds = [
        name
        for name in _OPTIONS
        if name in (*_REQUIRED, "cached_prompt_usu") or any(getattr(row[2], name) for row in rows)
    ]
    output.table(
        [
            *("MODEL", "SITE"),
            *(Column(_head(kind), numeric=True) for kind in kinds),
            *("SET FOR", "SINCE (UTC)"),
        ],
        [
            (
                *(ref, name, *(getattr(rate, kind) for kind in kinds)),
                *(f"{rate.model} at {rate.site}", day(rate.effective_from)),
            )
            for ref, name, rate in rows
        ],
        title="SU per million",
    )


def _head(kind: str) -> str:
    return _OPTIONS[kind][0].strip("-").removesuffix("-prompt").upper()


def _set(
    model: str,
    site: str,
    starts_at: datetime | None,
    prices: dict[str, Any],
    books: Books,
    output: Output,
) -> None:
    given = {name: price for name, price in prices.items() if price is not None}
    record = books.ledger.set_rate(model, site, effective_from=starts_at, **given)
    warn_of_absent(books, model=model, site=site)
    from_at = day(record.effective_from)
    output.json(record) if output.is_json else note(f"Prices of {model} at {site} from {from_at}.")
