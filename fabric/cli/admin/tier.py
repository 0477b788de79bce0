"""``fabric-admin tier``."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from fabric.cli.admin.change import Change, change_options, require_some
from fabric.cli.admin.database import Books, database_options, yes_option
from fabric.cli.options import Command
from fabric.cli.output import Column, Output
from fabric.errors import RequestInvalid

if TYPE_CHECKING:
    from fabric.broker import Tier

NAMES = ("interactive", "standard", "introspection", "batch")

_OPTIONS = {
    "charge_factor": ("--charge-factor", "What it multiplies a charge by."),
    "weight": ("--weight", "Its part of a project's share."),
    "first_token_s": ("--first-token", "Seconds to the first token, as promised."),
    "token_s": ("--token", "Seconds from token to token, as promised."),
    "share_in_time": ("--in-time", "Part of the requests for which these hold."),
    "share_answered": ("--answered", "Part of the requests that are answered."),
}


def _parameters(function: Command) -> Command:
    """Add an option for every parameter; those not given are ``None``."""
    for name, (option, text) in reversed(_OPTIONS.items()):
        function = click.option(option, name, type=float, metavar="N", help=text)(function)
    return function


_name = click.argument("name", type=click.Choice(NAMES), metavar="TIER")


@click.group()
def tier() -> None:
    """What requests may ask for in haste, and what that costs them.

    The tiers themselves are the release's: interactive, standard, introspection (programs of
    the other two, which pay as these) and batch. What each promises, costs and weighs can be
    changed; hubs hear of it within a second. What programs may take in a tier is the release's.

    \b
    Example:
      fabric-admin tier show
    """


@tier.command()
@click.argument("name", type=click.Choice(NAMES), metavar="[TIER]", required=False)
@database_options
def show(name: Tier | None, books: Books, output: Output) -> None:
    """List the tiers, or show one: what it multiplies a charge by, what it promises, its weight.

    "changed" names what is not as the release has it.

    \b
    Example:
      fabric-admin tier show --format json
    """
    records = _records(books)
    if name is not None:
        output.record(records[name])
        return
    if output.is_json:
        output.json(list(records.values()))
        return
    heads = ("CHARGE", "FIRST TOKEN", "A TOKEN", "IN TIME", "ANSWERED", "WEIGHT")
    output.table(
        ["TIER", *(Column(head, numeric=True) for head in heads), ""],
        [
            (
                *(one["tier"], one["charge_factor"] or "as paid"),
                *(_seconds(one["first_token_s"]), _seconds(one["token_s"])),
                *(f"{one['share_in_time']:.1%}", f"{one['share_answered']:.1%}"),
                *(one["weight"], "changed" if one["changed"] else ""),
            )
            for one in records.values()
        ],
    )


@tier.command()
@_name
@_parameters
@change_options
def modify(name: Tier, books: Books, change: Change, **given: float | None) -> None:
    """Change what a tier promises, costs or weighs; what is left out stays as it is.

    Requests that were admitted before are charged as they were told. Who is admitted by a
    promised first token (interactive, introspection) is so by the new one.

    \b
    Example:
      fabric-admin tier modify interactive --charge-factor 2 --first-token 1.5
    """
    from fabric.broker import parameters_of

    terms = {key: value for key, value in given.items() if value is not None}
    require_some("tier", name, {_OPTIONS[key][0]: value for key, value in given.items()})
    for key in terms.keys() - parameters_of(name):
        reason = f"{name} has none to change; see fabric-admin tier show"
        raise RequestInvalid(param=_OPTIONS[key][0], value=str(terms[key]), reason=reason)
    with books.database.transaction():
        before = _records(books)[name]
        books.tiers.modify(name, terms)
        after = _records(books)[name]
    change.tell("changed", f"tier {name}", after, before=before)


@tier.command()
@_name
@yes_option
@change_options
def delete(name: Tier, yes: bool, books: Books, change: Change) -> None:
    """Forget what was changed of a tier: it is as the release has it again.

    \b
    Example:
      fabric-admin tier delete interactive --yes
    """
    change.confirm(f"Forget what was changed of the tier {name}?", yes=yes)
    with books.database.transaction():
        before = _records(books)[name]
        books.tiers.delete(name)
        after = _records(books)[name]
    change.tell("reset", f"tier {name}", after, before=before)


def _records(books: Books) -> dict[Tier, dict[str, Any]]:
    """Return all tiers as they are, by name."""
    from fabric.broker import get_factors, get_promises, parameters_of

    changed = books.tiers.changed()
    factors = get_factors(changed)
    return {
        name: {
            "tier": name,
            "charge_factor": factors.get(name),
            **asdict(promise),
            "changed": [
                key
                for key in sorted(parameters_of(name))
                if name in changed and getattr(changed[name], key) is not None
            ],
        }
        for name, promise in get_promises(changed).items()
    }


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:g} s"
