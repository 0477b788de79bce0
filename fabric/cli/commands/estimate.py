"""``fabric estimate``: what a big run would take, before it is begun."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Literal

import click

from fabric.cli.options import client_options
from fabric.cli.output import Column, Output, note

if TYPE_CHECKING:
    from fabric.sdk import Fabric
    from fabric.sdk.tiers import Duration, Estimate, SiteEstimate

_MOST = 10**12
_SPANS = ((86_400.0, "d"), (3_600.0, "h"), (60.0, "min"))

_EPILOG = """\b
Example:
  fabric estimate --requests 1e6 --prompt-tokens 800 --output-tokens 100

Nothing is run and nothing is charged. A site's rows are taken to be full of
this run, at the speed that its replicas had of late. 10% of such runs are
expected to be done within the first of the three times, 90% within the last.
The price holds if no prompt is cached; what is cached costs less.
"""


class CountType(click.ParamType):
    """A whole number such as ``1000000``, ``1e6`` or ``1,000,000``."""

    name = "NUMBER"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """Return the number."""
        try:
            number = Decimal(str(value).replace(",", ""))
        except InvalidOperation:
            number = Decimal("NaN")
        # A NaN is compared with nothing, and the size is looked at before a power is written out.
        in_range = number.is_finite() and 1 <= number <= _MOST
        if not in_range or number != number.to_integral_value():
            self.fail(f"{value!r} is not a whole number from 1 to 1e12, such as 1e6", param, ctx)
        return int(number)


@click.command(epilog=_EPILOG)
@click.option("--requests", "num_requests", type=CountType(), required=True, help="How many.")
@click.option("--prompt-tokens", type=CountType(), required=True, help="Of each of them.")
@click.option(
    "--output-tokens", type=click.IntRange(min=0), required=True, help="That each generates."
)
@click.option("--model", metavar="NAME[@REVISION]", help="The model to ask.")
@click.option(
    "--tier",
    type=click.Choice(["interactive", "standard", "batch"]),
    default="batch",
    show_default=True,
)
@click.option("--site", "sites", multiple=True, help="May serve it; repeatable.")
@client_options
def estimate(
    num_requests: int,
    prompt_tokens: int,
    output_tokens: int,
    model: str | None,
    tier: Literal["interactive", "standard", "batch"],
    sites: tuple[str, ...],
    fabric: Fabric,
    output: Output,
) -> None:
    """Show what many requests of one size would take and cost, by site."""
    found = fabric.estimate(
        num_requests,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        model=model,
        tier=tier,
        sites=sites or None,
    )
    if output.is_json:
        output.json(found)
        return
    click.echo(
        f"{found.num_requests:,} requests of {found.prompt_tokens:,} and"
        f" {found.output_tokens:,} tokens to {found.model}, {found.tier}"
    )
    output.table(
        [
            Column("SITE", whole=True),
            *(Column(name, numeric=True) for name in ("ROWS", "REQ/S", "10%", "50%", "90%")),
            *(Column(name, numeric=True) for name in ("SU", "AVAILABLE")),
        ],
        [*map(_row, found.sites), _total(found)],
    )
    for site in found.sites:
        if site.num_replicas and not site.is_measured:
            note(f"{site.site}: too few answers were timed there yet; its times are a guess.")
        if site.charge_usu > site.available_usu:
            note(f"{site.site}: your project cannot pay for all of it there.")


def _row(site: SiteEstimate) -> tuple[object, ...]:
    return (
        site.site,
        site.num_rows or "none",
        _number(site.requests_per_s),
        *_times(site.duration),
        _su(site.charge_usu),
        _su(site.available_usu),
    )


def _total(found: Estimate) -> tuple[object, ...]:
    return (
        "all",
        sum(site.num_rows for site in found.sites) or "none",
        _number(found.requests_per_s),
        *_times(found.duration),
        _su(found.charge_usu),
        "",
    )


def _times(duration: Duration | None) -> tuple[str, str, str]:
    if duration is None:
        return ("", "", "")
    return (span(duration.p10_s), span(duration.p50_s), span(duration.p90_s))


def span(seconds: float) -> str:
    """Return a duration in its largest unit: ``36 s``, ``12.5 min``, ``3.1 h``, ``2.0 d``."""
    for unit_s, name in _SPANS:
        if seconds >= unit_s:
            return f"{seconds / unit_s:,.1f} {name}"
    return f"{seconds:.1f} s"


def _number(value: float) -> str:
    return f"{value:,.1f}" if value else ""


def _su(amount_usu: int) -> str:
    return f"{amount_usu / 1e6:,.2f}" if abs(amount_usu) < 10**13 else f"{amount_usu / 1e6:.2e}"
