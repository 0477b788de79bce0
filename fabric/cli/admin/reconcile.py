"""``fabric-admin reconcile``."""

from __future__ import annotations

from typing import IO

import click

from fabric.cli.admin.change import undoable_options
from fabric.cli.admin.database import Books
from fabric.cli.money import su
from fabric.cli.output import Column, Output, note


@click.command()
@click.argument("site")
@click.argument("jobs", type=click.File())
@click.option(
    "--scheduler", type=click.Choice(["slurm", "pbs"]), default="slurm", show_default=True
)
@click.option("--unit", required=True, help="What an hour of one is charged in.")
@click.option("--tres", help="One what, by AllocTRES or Resource_List.  [default: a node]")
@undoable_options
def reconcile(
    site: str,
    jobs: IO[str],
    scheduler: str,
    unit: str,
    tres: str | None,
    books: Books,
    output: Output,
) -> None:
    """Post what the centre of SITE charged for jobs beyond what was billed in them.

    JOBS is a file (- for standard input) with the jobs that ended, as one of these prints them;
    those that were told before count once:

    \b
      SLURM_TIME_FORMAT=%s sacct -X -P -n -o JobIDRaw,State,Start,End,AllocTRES
      qstat -x -f -F json

    The difference goes to the account overhead:SITE.

    \b
    Example:
      fabric-admin reconcile alpha jobs.txt --unit node-hour
    """
    from fabric.ledger.qstat import read_qstat
    from fabric.ledger.sacct import read_sacct

    books.catalog.get_site(site)
    read = read_qstat if scheduler == "pbs" else read_sacct
    only = {} if tres is None else {"tres": tres}
    ended = list(read(jobs.read(), site, books.ledger.unit(unit), **only))
    found = books.ledger.reconcile(site, ended)
    if output.is_json:
        output.json(
            {
                "site": site,
                "jobs": [
                    {
                        "job": one.job.job,
                        "charge_usu": one.job.charge_usu,
                        "billed_usu": one.billed_usu,
                        "overhead_usu": one.amount_usu,
                    }
                    for one in found.overheads
                ],
                "unattributed_usu": found.unattributed_usu,
            }
        )
        return
    output.table(
        [
            *("JOB", "ENDED (UTC)", Column("CHARGED SU", numeric=True)),
            *(Column("BILLED SU", numeric=True), Column("OVERHEAD SU", numeric=True)),
        ],
        [
            (
                *(one.job.job, f"{one.job.ended_at:%Y-%m-%d %H:%M}", su(one.job.charge_usu)),
                *(su(one.billed_usu), su(one.amount_usu)),
            )
            for one in found.overheads
        ],
        empty="No job is new.",
    )
    if found.unattributed_usu:
        note(f"{su(found.unattributed_usu)} SU were billed there while none of these jobs ran.")
