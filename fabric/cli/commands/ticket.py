"""``fabric ticket``: what pays for raw Globus Compute calls."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from fabric.cli.duration import DURATION
from fabric.cli.money import SU, su
from fabric.cli.options import client_options
from fabric.cli.output import Column, Output, note

if TYPE_CHECKING:
    from fabric.sdk import Fabric


@click.command()
@click.option("--site", help="The site whose endpoint is called.")
@click.option("--ttl", type=DURATION, default="1h", show_default=True, help="At most a day.")
@click.option("--max-su", "max_usu", type=SU, help="The most its calls together may cost.")
@click.option("--list", "is_list", is_flag=True, help="List the project's tickets instead.")
@click.option("--revoke", "revoked", metavar="ID", help="Void a ticket instead.")
@client_options
def ticket(
    site: str | None,
    ttl: float,
    max_usu: int | None,
    is_list: bool,
    revoked: str | None,
    fabric: Fabric,
    output: Output,
) -> None:
    """Get a ticket for raw calls at a site and print it: this is the only time it can be seen.

    It goes into each batch for the site's `infer` function; what the batch consumes is charged to
    your project.
    """
    if (site is not None) + is_list + (revoked is not None) != 1:
        raise click.UsageError("Give one of --site, --list and --revoke.")
    if is_list:
        _print_all(fabric, output)
    elif revoked is not None:
        record = fabric.revoke_ticket(revoked)
        output.json(record) if output.is_json else note(f"Revoked the ticket {record.id}.")
    elif site is not None:
        issued = fabric.ticket(site, ttl_s=ttl, max_usu=max_usu)
        if output.is_json:
            output.json(issued)
            return
        note(f"The ticket {issued.id} is good at {site} until {issued.expires_at[:19]} UTC.")
        click.echo(issued.ticket)


def _print_all(fabric: Fabric, output: Output) -> None:
    records = fabric.tickets()
    if output.is_json:
        output.json(records)
        return
    output.table(
        ["TICKET", "SITE", Column("AT MOST SU", numeric=True), "EXPIRES (UTC)"],
        [
            (one.id, one.site, "" if one.max_usu is None else su(one.max_usu), one.expires_at[:19])
            for one in records
        ],
        empty="There are none; `fabric ticket --site S` gets one.",
    )
