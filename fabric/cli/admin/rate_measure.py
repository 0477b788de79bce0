"""``fabric-admin rate measure``."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal

import click

from fabric.cli.admin.database import UTC_TIME, Books, database_options
from fabric.cli.money import SU
from fabric.cli.output import Column, Output, note

MAX_RUNS = 100_000


@click.command()
@click.argument("model")
@click.argument("site")
@click.option(
    "--node-hour", "node_hour_usu", type=SU, required=True, help="What a node's hour costs, in SU."
)
@click.option("--devices", type=click.IntRange(1), default=1, help="An instance's; 1.")
@click.option("--devices-per-node", type=click.IntRange(1), default=1, help="A node's; 1.")
@click.option("--since", type=UTC_TIME, help="Only runs since then (UTC).")
@click.option("--until", type=UTC_TIME, help="Only runs before then (UTC).")
@click.option("--apply", "is_applied", is_flag=True, help="Set the prices, from now on.")
@database_options
def measure(
    model: str,
    site: str,
    node_hour_usu: int,
    devices: int,
    devices_per_node: int,
    since: datetime | None,
    until: datetime | None,
    is_applied: bool,
    books: Books,
    output: Output,
) -> None:
    """Derive what tokens of MODEL cost at SITE from the seconds that runs took of the device.

    The seconds are fitted by least squares to the runs' uncached, cached and generated tokens.
    Without --apply nothing is changed; what is not a token's keeps its price.

    \b
    Example:
      fabric-admin rate measure smol@1 alpha --node-hour 1 --devices-per-node 4
    """
    from dataclasses import asdict

    from fabric.errors import RateMissing
    from fabric.ledger import PRICES
    from fabric.ledger.measure import Sample, usu_per_device_s
    from fabric.ledger.measure import measure as fit

    version = books.catalog.resolve(model)
    books.catalog.get_site(site)
    runs = books.catalog.runs(
        since=since, until=until, limit=MAX_RUNS, model=version.ref, site=site
    )
    found = fit(
        (
            Sample(
                prompt_tokens=run.usage.prompt_tokens,
                cached_prompt_tokens=run.usage.cached_prompt_tokens,
                output_tokens=run.usage.output_tokens,
                device_s=run.usage.device_s,
            )
            for run in runs
            if run.program is None
        ),
        model=version.ref,
        site=site,
    )
    second_usu = usu_per_device_s(Decimal(node_hour_usu) / 1_000_000, devices, devices_per_node)
    prices = found.prices(second_usu)
    if is_applied:
        try:
            kept = asdict(books.ledger.rate(version.ref, site))
        except RateMissing:
            kept = {}
        others = {name: price for name, price in kept.items() if name in PRICES}
        books.ledger.set_rate(version.ref, site, **(others | dict(prices)))
    if output.is_json:
        output.json({"measured": found, "usu_per_device_s": second_usu, "prices": prices})
        return
    taken = {
        "prompt": (found.prompt_s, prices["prompt_usu"]),
        "cached prompt": (found.cached_prompt_s, prices["cached_prompt_usu"]),
        "output": (found.output_s, prices["output_usu"]),
    }
    output.table(
        ["TOKEN", Column("SECONDS PER MILLION", numeric=True), Column("SU", numeric=True)],
        [(kind, f"{seconds * 1e6:,.1f}", price) for kind, (seconds, price) in taken.items()],
        title=f"{version.ref} at {site}: {found.num_runs} runs, R² {found.r2:.3f}",
    )
    if not found.cached_was_seen:
        note("No run had cached tokens; a tenth of an uncached one was taken.")
    note("The prices are set." if is_applied else "Nothing was changed; --apply sets them.")
