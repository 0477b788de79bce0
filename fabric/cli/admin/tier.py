"""``fabric-admin tier``."""

from __future__ import annotations

import click

from fabric.cli.options import output_options
from fabric.cli.output import Column, Output


@click.group()
def tier() -> None:
    """What requests may ask for in haste, and what that costs them.

    \b
    Example:
      fabric-admin tier show
    """


@tier.command()
@output_options
def show(output: Output) -> None:
    """List the tiers with what each multiplies a charge by.

    Tiers are the release's; every hub has the same.

    \b
    Example:
      fabric-admin tier show --format json
    """
    from fabric.ledger import TIERS

    if output.is_json:
        output.json([{"tier": name, "charge_factor": factor} for name, factor in TIERS.items()])
        return
    output.table(["TIER", Column("CHARGE FACTOR", numeric=True)], list(TIERS.items()))
