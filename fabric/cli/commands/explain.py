"""``fabric explain``: where a request would run, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from fabric.cli.answers import why
from fabric.cli.options import client_options, read_prompt, request_options
from fabric.cli.output import Column, Output, short

if TYPE_CHECKING:
    from fabric.messages import Candidate, Placement
    from fabric.sdk import Fabric, Options


@click.command()
@click.argument("prompt", required=False)
@request_options
@client_options
def explain(prompt: str | None, options: Options, fabric: Fabric, output: Output) -> None:
    """Show what every candidate would cost, in expected seconds, and which one is taken.

    Nothing is run and nothing is charged.
    """
    from fabric.sdk.options import as_conversation

    placement = fabric.explain(as_conversation(read_prompt(prompt)), **options)
    if output.is_json:
        output.json(placement)
        return
    parts = list(dict.fromkeys(part for c in placement.candidates for part in c.cost_s))
    corrected = any(c.correction != 1.0 for c in placement.candidates)
    output.table(
        [
            *("", "SITE", "INSTANCE"),
            *(Column(part.upper(), numeric=True) for part in parts),
            *([Column("OBSERVED/PREDICTED", numeric=True)] if corrected else []),
            Column("TOTAL S", numeric=True),
            "EXCLUDED BECAUSE",
        ],
        [_row(candidate, parts, placement, corrected) for candidate in _ranked(placement)],
    )
    click.echo(why(placement.site, placement.reason))
    there = {candidate.site for candidate in placement.candidates}
    for site in fabric.sites():
        if site.name in there and site.detail:
            click.echo(f"{site.name}: {site.detail}")


def _ranked(placement: Placement) -> list[Candidate]:
    return sorted(
        placement.candidates,
        key=lambda c: (c.total_s is None, c.total_s or 0.0, c.site, c.instance),
    )


def _row(
    candidate: Candidate, parts: list[str], placement: Placement, corrected: bool
) -> tuple[object, ...]:
    return (
        "▸" if candidate.instance == placement.instance else "",
        candidate.site,
        short(candidate.instance),
        *(_seconds(candidate.cost_s.get(part)) for part in parts),
        *([f"{candidate.correction:.2f}"] if corrected else []),
        _seconds(candidate.total_s),
        candidate.excluded or _ready(candidate.ready_in_s),
    )


def _ready(ready_in_s: float | None) -> str:
    return "" if ready_in_s is None else f"(on its way, ready in about {ready_in_s:.0f} s)"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
