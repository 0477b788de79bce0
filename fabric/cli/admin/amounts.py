"""Amounts on the command line: in SU, or in a unit that is worth some."""

from __future__ import annotations

import functools
from decimal import Decimal, InvalidOperation
from typing import Any

import click

from fabric.cli.admin.database import Books
from fabric.cli.money import SU
from fabric.cli.options import Command


def amount_options(function: Command) -> Command:
    """Add ``--su`` and ``--amount``, of which one is given; the function gets ``amount_usu``."""
    return _take_amount(function, is_required=True)


def optional_amount(function: Command) -> Command:
    """Add ``--su`` and ``--amount``; ``amount_usu`` is ``None`` if neither is given."""
    return _take_amount(function, is_required=False)


def _take_amount(function: Command, *, is_required: bool) -> Command:
    @click.option("--su", "su_usu", type=SU, help="How much, such as 10 or 0.5.")
    @click.option("--amount", metavar="'N UNIT'", help="How much in a unit: '4 node-hour'.")
    @functools.wraps(function)
    def wrapper(
        *args: Any, su_usu: int | None, amount: str | None, books: Books, **kwargs: Any
    ) -> Any:
        num_given = sum(one is not None for one in (su_usu, amount))
        if num_given > 1 or num_given < is_required:
            raise click.UsageError("Give either --su or --amount.")
        amount_usu = su_usu if amount is None else _exchanged(amount, books)
        return function(*args, amount_usu=amount_usu, books=books, **kwargs)

    return wrapper  # type: ignore[return-value]


def _exchanged(amount: str, books: Books) -> int:
    """Return ``4 node-hour``, say, in micro-SU at today's worth."""
    try:
        number, unit = amount.split()
        worth = Decimal(number)
    except (ValueError, InvalidOperation) as error:
        raise click.UsageError(
            f"{amount!r} is not a number and a unit, such as '4 node-hour'."
        ) from error
    return books.ledger.unit(unit).to_usu(worth)
