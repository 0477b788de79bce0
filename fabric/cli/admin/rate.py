"""``fabric-admin rate``."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal, InvalidOperation

import click

from fabric.cli.admin.database import UTC_TIME, Books, database_options, day
from fabric.cli.output import Column, Output, note
from fabric.errors import RateMissing


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


@click.group()
def rate() -> None:
    """What tokens cost, in SU per million. Prices are never changed, only followed by others.

    Programs also pay for bytes (SU per million) and for computing (micro-SU per second).
    """


@rate.command()
@click.argument("model")
@click.argument("site")
@click.option("--prompt", "prompt_usu", type=PRICE, required=True, help="For prompt tokens.")
@click.option(
    "--cached-prompt", "cached_prompt_usu", type=PRICE, help="For cached ones; as --prompt."
)
@click.option("--output", "output_usu", type=PRICE, required=True, help="For generated tokens.")
@click.option("--hook-in", "hook_in_usu", type=PRICE, default="0", help="For a program's bytes in.")
@click.option("--hook-out", "hook_out_usu", type=PRICE, default="0", help="For its bytes out.")
@click.option("--device", "device_usu", type=PRICE, default="0", help="For a second it computes.")
@click.option("--from", "effective_from", type=UTC_TIME, help="From when on (UTC); now.")
@database_options
def add(
    model: str,
    site: str,
    prompt_usu: Decimal,
    cached_prompt_usu: Decimal | None,
    output_usu: Decimal,
    hook_in_usu: Decimal,
    hook_out_usu: Decimal,
    device_usu: Decimal,
    effective_from: datetime | None,
    books: Books,
    output: Output,
) -> None:
    """Set prices for MODEL at SITE; * stands for all that have none of their own."""
    record = books.ledger.set_rate(
        model,
        site,
        prompt_usu=prompt_usu,
        cached_prompt_usu=prompt_usu if cached_prompt_usu is None else cached_prompt_usu,
        output_usu=output_usu,
        hook_in_usu=hook_in_usu,
        hook_out_usu=hook_out_usu,
        device_usu=device_usu,
        effective_from=effective_from,
    )
    from_at = day(record.effective_from)
    output.json(record) if output.is_json else note(f"Prices of {model} at {site} from {from_at}.")


@rate.command()
@click.option("--model", "models", multiple=True, help="Only this one; repeatable.")
@click.option("--site", "sites", multiple=True, help="Only this one; repeatable.")
@database_options
def show(models: tuple[str, ...], sites: tuple[str, ...], books: Books, output: Output) -> None:
    """Show what tokens of each model cost at each site now."""
    refs = models or tuple(model.ref for model in books.catalog.models()) or ("*",)
    names = sites or tuple(site.name for site in books.catalog.sites()) or ("*",)
    found = []
    for ref in refs:
        for name in names:
            try:
                found.append((ref, name, books.ledger.rate(ref, name)))
            except RateMissing:
                note(f"There is no price for {ref} at {name}.")
    if output.is_json:
        output.json([{"model": ref, "site": name, "rate": rate} for ref, name, rate in found])
        return
    output.table(
        [
            *("MODEL", "SITE", Column("PROMPT", numeric=True), Column("CACHED", numeric=True)),
            *(Column("OUTPUT", numeric=True), Column("HOOK IN", numeric=True)),
            *(Column("HOOK OUT", numeric=True), Column("DEVICE S", numeric=True)),
            *("SET FOR", "SINCE (UTC)"),
        ],
        [
            (
                *(ref, name, rate.prompt_usu, rate.cached_prompt_usu, rate.output_usu),
                *(rate.hook_in_usu, rate.hook_out_usu, rate.device_usu),
                *(f"{rate.model} at {rate.site}", day(rate.effective_from)),
            )
            for ref, name, rate in found
        ],
        title="SU per million tokens, bytes and seconds",
    )
