"""``fabric usage``: allocations and charges."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from fabric.cli.money import su
from fabric.cli.options import client_options
from fabric.cli.output import Column, Output, note, short
from fabric.cli.statement_csv import to_csv

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fabric.sdk import Fabric, Spend
    from fabric.sdk.records import Allocation


@click.command()
@click.option("--since", type=click.DateTime(), help="Only what was charged since then (UTC).")
@click.option("--limit", type=click.IntRange(1, 10_000), default=20, show_default=True)
@click.option("--csv", "as_csv", is_flag=True, help="Print lines for a spreadsheet.")
@click.option("--sums", is_flag=True, help="Add runs up, by model and site.")
@client_options
def usage(
    since: object, limit: int, as_csv: bool, sums: bool, fabric: Fabric, output: Output
) -> None:
    """Show what your project may spend, and what it was charged."""
    from_at = f"{since:%Y-%m-%dT%H:%M:%SZ}" if since else None
    if sums:
        if as_csv:
            raise click.UsageError("Choose one of --csv and --sums.")
        _show_sums(fabric.spend(since=from_at), output)
        return
    statement = fabric.usage(since=from_at, limit=limit)
    if output.is_json:
        output.json(statement)
        return
    if as_csv:
        click.echo(to_csv(statement.lines), nl=False)
        return
    output.table(
        ["SITE", Column("AVAILABLE SU", numeric=True), Column("HELD SU", numeric=True), "ENDS"],
        [
            (
                _place(account),
                su(account.available_usu),
                su(account.held_usu),
                account.ends_at[:19] if account.ends_at else "never",
            )
            for account in statement.allocations
        ],
        title=f"Allocations of {statement.project}",
        empty="There are none; an administrator adds one with `fabric-admin alloc add`.",
    )
    output.table(
        [
            *("WHEN (UTC)", "WHAT", "MODEL", "SITE", "RUN"),
            *(Column("SU", numeric=True), Column("BALANCE SU", numeric=True)),
        ],
        [
            (
                line.at[:19].replace("T", " "),
                line.kind,
                line.model,
                line.site,
                short(line.run) if line.run else line.memo,
                su(line.amount_usu),
                su(line.balance_usu),
            )
            for line in statement.lines
        ],
        title="Statement",
        empty="Nothing was charged.",
    )
    if not statement.complete:
        note("There are older lines; --limit shows more.")


def _show_sums(spent: Sequence[Spend], output: Output) -> None:
    if output.is_json:
        output.json(spent)
        return
    numbers = ("RUNS", "PROMPT", "CACHED", "OUTPUT", "DEVICE S", "SU")
    output.table(
        ["MODEL", "SITE", *(Column(name, numeric=True) for name in numbers)],
        [
            (
                *(one.model, one.site, one.num_runs, one.prompt_tokens),
                *(one.cached_prompt_tokens, one.output_tokens, f"{one.device_s:.1f}"),
                su(one.charge_usu),
            )
            for one in spent
        ],
        empty="Nothing was run.",
    )


def _place(account: Allocation) -> str:
    """Return where an allocation may be spent, and what tells it from others there."""
    where = "any" if account.site == "*" else account.site
    share = f"share of {account.holder}" if account.holder else None
    return ", ".join(part for part in (where, account.period, share) if part)
