"""``fabric-admin tier``."""

from __future__ import annotations

from dataclasses import asdict

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
    """List the tiers: what each multiplies a charge by, what it promises, and its part of a share.

    Tiers are the release's; every hub has the same. Programs have the promise of introspection,
    whatever tier they pay.

    \b
    Example:
      fabric-admin tier show --format json
    """
    from fabric.broker import PROMISES
    from fabric.ledger import TIERS

    if output.is_json:
        output.json(
            [
                {"tier": name, "charge_factor": TIERS.get(name), **asdict(promise)}
                for name, promise in PROMISES.items()
            ]
        )
        return
    heads = ("CHARGE", "FIRST TOKEN", "A TOKEN", "IN TIME", "ANSWERED", "WEIGHT")
    output.table(
        ["TIER", *(Column(head, numeric=True) for head in heads)],
        [
            (
                *(name, TIERS.get(name, "as paid")),
                *(_seconds(promise.first_token_s), _seconds(promise.token_s)),
                *(f"{promise.share_in_time:.1%}", f"{promise.share_answered:.1%}"),
                promise.weight,
            )
            for name, promise in PROMISES.items()
        ],
    )


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:g} s"
