"""``fabric-admin grant``."""

from __future__ import annotations

from typing import Literal

import click

from fabric.cli.admin.change import undoable_options
from fabric.cli.admin.database import Books, confirm, database_options, yes_option
from fabric.cli.output import Output, note

MODES = ("query", "embed", "read", "write", "gradient", "weights", "fine-tune", "launch")
TIERS = ("interactive", "standard", "batch")

mode_option = click.option(
    "--mode", "modes", type=click.Choice(MODES), multiple=True, help="Repeatable; all if left out."
)
tier_option = click.option(
    "--tier", "tiers", type=click.Choice(TIERS), multiple=True, help="Repeatable; all if left out."
)
kind_argument = click.argument("kind", type=click.Choice(["model", "site"]))


@click.group()
def grant() -> None:
    """Who may use private models and sites, and for what.

    \b
    A model or site is public until its first grant. Example:
      fabric-admin grant add project:astro --model llama-70b --mode query
    SUBJECT is project:NAME, key:ID, user:NAME@DOMAIN, group:UUID, or * for
    everybody. Hubs act by a change within a second.
    """


@grant.command()
@click.argument("subject")
@click.option("--model", metavar="NAME", help="Without a revision; * for all that are private.")
@click.option("--site", metavar="NAME", help="A site, or with --model where that may be used.")
@mode_option
@tier_option
@undoable_options
def add(
    subject: str,
    model: str | None,
    site: str | None,
    modes: tuple[str, ...],
    tiers: tuple[str, ...],
    books: Books,
    output: Output,
) -> None:
    """Let SUBJECT use a model, or a site; it is private from now on.

    \b
    Example:
      fabric-admin grant add project:astro --model llama-70b --mode query
    """
    what = books.grants.add(
        subject, model=model, site=site, modes=modes or MODES, tiers=tiers or TIERS
    )
    output.json(what) if output.is_json else note(f"Added the grant {what.id} to {what.subject}.")


@grant.command()
@click.argument("grant_id", required=False)
@click.option("--subject", help="Only those of this subject.")
@click.option("--model", help="Only those of this model.")
@click.option("--site", help="Only those of this site.")
@database_options
def show(
    grant_id: str | None,
    subject: str | None,
    model: str | None,
    site: str | None,
    books: Books,
    output: Output,
) -> None:
    """List the grants and what is private, or show one grant.

    \b
    Example:
      fabric-admin grant show --model llama-70b
    """
    found = books.grants.grants(subject=subject, model=model, site=site)
    records = [books.grants.grant(grant_id)] if grant_id else found
    if output.is_json:
        output.json(records[0] if grant_id else records)
        return
    output.table(
        ["GRANT", "SUBJECT", "MODEL", "SITE", "MODES", "TIERS"],
        [
            (
                *(one.id, one.subject, one.model or "any public", one.site or "any public"),
                *(_all_or_some(one.modes, MODES), _all_or_some(one.tiers, TIERS)),
            )
            for one in records
        ],
    )
    if not grant_id:
        private = [f"{kind} {name}" for kind, name in books.grants.private()]
        note(f"Private: {', '.join(private) or 'nothing'}.")


@grant.command()
@click.argument("grant_id")
@mode_option
@tier_option
@undoable_options
def modify(
    grant_id: str, modes: tuple[str, ...], tiers: tuple[str, ...], books: Books, output: Output
) -> None:
    """Change what a grant allows: the modes, the tiers, or both.

    \b
    Example:
      fabric-admin grant modify grant_0a1b2c3d --tier batch
    """
    record = books.grants.modify(grant_id, modes=modes or None, tiers=tiers or None)
    output.json(record) if output.is_json else note(f"Changed the grant {grant_id}.")


@grant.command()
@click.argument("grant_id")
@yes_option
@undoable_options
def delete(grant_id: str, yes: bool, books: Books, output: Output) -> None:
    """Take a grant back; what it was of stays private.

    \b
    Example:
      fabric-admin grant delete grant_0a1b2c3d --yes
    """
    record = books.grants.grant(grant_id)
    confirm(f"Take the grant {grant_id} from {record.subject}?", yes=yes)
    record = books.grants.delete(grant_id)
    output.json(record) if output.is_json else note(f"Deleted the grant {grant_id}.")


@grant.command()
@kind_argument
@click.argument("name")
@undoable_options
def close(kind: Literal["model", "site"], name: str, books: Books, output: Output) -> None:
    """Make a model or site private before anybody has a grant of it.

    \b
    Example:
      fabric-admin grant close model llama-70b
    """
    books.grants.close(kind, name)
    output.json({"private": [kind, name]}) if output.is_json else note(f"{name} is private.")


@grant.command("open")
@kind_argument
@click.argument("name")
@yes_option
@undoable_options
def open_(
    kind: Literal["model", "site"], name: str, yes: bool, books: Books, output: Output
) -> None:
    """Make a private model or site public again; its grants stay on record.

    \b
    Example:
      fabric-admin grant open site anvil --yes
    """
    confirm(f"Let everybody use the {kind} {name}?", yes=yes)
    books.grants.open(kind, name)
    output.json({"public": [kind, name]}) if output.is_json else note(f"{name} is public.")


def _all_or_some(some: frozenset[str], known: tuple[str, ...]) -> str:
    return "all" if some >= set(known) else " ".join(one for one in known if one in some)
