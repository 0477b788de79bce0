"""Service units as people write them; inside, amounts are integer micro-SU."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation

import click

USU_PER_SU = 1_000_000
MAX_USU = 10**18
"""What fits 64 bits; the ledger itself takes less at once."""


def su(amount_usu: int) -> str:
    """Return micro-SU as SU with six decimals: ``12.000345``."""
    sign = "-" if amount_usu < 0 else ""
    whole, rest = divmod(abs(amount_usu), USU_PER_SU)
    return f"{sign}{whole:,}.{rest:06d}"


class SuType(click.ParamType):
    """An amount of SU on the command line; its value is micro-SU."""

    name = "SU"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """Return the micro-SU."""
        if isinstance(value, int):
            return value
        try:
            amount = Decimal(str(value).replace(",", ""))
        except InvalidOperation:
            self.fail(f"{value!r} is not an amount of SU, such as 10 or 0.5", param, ctx)
        if not amount.is_finite() or amount.copy_abs() > MAX_USU // USU_PER_SU:
            self.fail(f"{value!r} is not a number of SU up to {su(MAX_USU)}", param, ctx)
        amount_usu = amount * USU_PER_SU
        if amount_usu != amount_usu.to_integral_value():
            self.fail(f"{value!r} is not a whole number of micro-SU (six decimals)", param, ctx)
        return int(amount_usu)


SU = SuType()
