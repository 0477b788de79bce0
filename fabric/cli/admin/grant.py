"""``fabric-admin grant``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import click

from fabric.cli.admin.change import Change, change_options
from fabric.cli.admin.database import Books, database_options, warn_of_absent, yes_option
from fabric.cli.output import Column, Output, note
from fabric.errors import NotFound

if TYPE_CHECKING:
    from fabric.auth import Grant

MODES = ("query", "embed", "read", "write", "gradient", "weights", "fine-tune", "launch")
TIERS = ("interactive", "standard", "batch")

mode_option = click.option(
    "--mode",
    "modes",
    type=click.Choice(MODES),
    multiple=True,
    metavar="MODE",
    help=f"What it is for: {', '.join(MODES)}. Repeatable; all if left out.",
)
tier_option = click.option(
    "--tier",
    "tiers",
    type=click.Choice(TIERS),
    multiple=True,
    metavar="TIER",
    help=f"How urgent: {', '.join(TIERS)}. Repeatable; all if left out.",
)
kind_argument = click.argument("kind", type=click.Choice(["model", "site"]), metavar="model|site")


@click.group()
def grant() -> None:
    """Who may use private models and sites, and for what.

    A model or site is public until its first grant. SUBJECT is project:NAME, key:ID,
    user:NAME@DOMAIN, group:UUID, or * for everybody.

    \b
    Example:
      fabric-admin grant add project:astro --model llama-70b
    """


@grant.command()
@click.argument("subject")
@click.option("--model", metavar="NAME", help="Without a revision; * for all that are private.")
@click.option("--site", metavar="NAME", help="A site, or with --model where that may be used.")
@mode_option
@tier_option
@change_options
def add(
    subject: str,
    model: str | None,
    site: str | None,
    modes: tuple[str, ...],
    tiers: tuple[str, ...],
    books: Books,
    change: Change,
) -> None:
    """Let SUBJECT use a model, or a site; it is private from now on.

    \b
    Example:
      fabric-admin grant add project:astro --model llama-70b --mode query
    """
    what = " at ".join(filter(None, (model and f"model {model}", site and f"site {site}")))
    change.add(
        f"grant of {what or 'nothing'} to {subject}",
        lambda: books.grants.add(
            subject, model=model, site=site, modes=modes or MODES, tiers=tiers or TIERS
        ),
        lambda: _find(books, subject, model, site),
        {"modes": frozenset(modes or MODES), "tiers": frozenset(tiers or TIERS)},
    )
    warn_of_absent(books, model=model, site=site)


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
    if grant_id:
        output.record(books.grants.grant(grant_id))
        return
    records = books.grants.grants(subject=subject, model=model, site=site)
    if output.is_json:
        output.json(records)
        return
    output.table(
        [Column("GRANT", whole=True), "SUBJECT", "MODEL", "SITE", "MODES", "TIERS"],
        [
            (
                *(one.id, one.subject, one.model or "public", one.site or "public"),
                *(_all_or_some(one.modes, MODES), _all_or_some(one.tiers, TIERS)),
            )
            for one in records
        ],
    )
    private = [f"{kind} {name}" for kind, name in books.grants.private()]
    note(f"Private: {', '.join(private) or 'nothing'}.")


@grant.command()
@click.argument("grant_id")
@mode_option
@tier_option
@change_options
def modify(
    grant_id: str, modes: tuple[str, ...], tiers: tuple[str, ...], books: Books, change: Change
) -> None:
    """Change what a grant allows: the modes, the tiers, or both.

    \b
    Example:
      fabric-admin grant modify 5b1e0c7a94d2 --mode query --mode embed
    """
    before = books.grants.grant(grant_id)
    after = books.grants.modify(grant_id, modes=modes or None, tiers=tiers or None)
    change.tell("changed", f"grant {grant_id}", after, before=before)


@grant.command()
@click.argument("grant_id")
@yes_option
@change_options
def delete(grant_id: str, yes: bool, books: Books, change: Change) -> None:
    """Take a grant back; what it was of stays private.

    \b
    Example:
      fabric-admin grant delete 5b1e0c7a94d2 --yes
    """
    record = books.grants.grant(grant_id)
    change.confirm(f"Take the grant {grant_id} from {record.subject}?", yes=yes)
    change.tell("deleted", f"grant {grant_id}", books.grants.delete(grant_id))


@grant.command()
@kind_argument
@click.argument("name")
@change_options
def close(kind: Literal["model", "site"], name: str, books: Books, change: Change) -> None:
    """Make a model or site private before anybody has a grant of it.

    \b
    Example:
      fabric-admin grant close model gemma-27b
    """
    books.grants.close(kind, name)
    change.tell("made private", f"{kind} {name}", {"private": True})


@grant.command("open")
@kind_argument
@click.argument("name")
@yes_option
@change_options
def open_(
    kind: Literal["model", "site"], name: str, yes: bool, books: Books, change: Change
) -> None:
    """Make a private model or site public again; its grants stay on record.

    \b
    Example:
      fabric-admin grant open model gemma-27b --yes
    """
    change.confirm(f"Let everybody use the {kind} {name}?", yes=yes)
    books.grants.open(kind, name)
    change.tell("made public", f"{kind} {name}", {"private": False})


def _find(books: Books, subject: str, model: str | None, site: str | None) -> Grant:
    for one in books.grants.grants():
        if (one.subject.lower(), one.model, one.site) == (subject.lower(), model, site):
            return one
    raise NotFound(kind="grant", name=subject)


def _all_or_some(some: frozenset[str], known: tuple[str, ...]) -> str:
    return "all" if some >= set(known) else " ".join(one for one in known if one in some)
