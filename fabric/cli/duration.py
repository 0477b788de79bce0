"""Durations as people write them; inside, they are seconds."""

from __future__ import annotations

import re

import click

_UNITS_S = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)([smhd]?)")


class DurationType(click.ParamType):
    """A time such as ``90``, ``90s``, ``30m``, ``1.5h`` or ``1d``; its value is seconds."""

    name = "TIME"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return the seconds."""
        if isinstance(value, float):
            return value
        if (match := _DURATION.fullmatch(str(value))) is None:
            self.fail(f"{value!r} is not a time, such as 90s, 30m or 1h", param, ctx)
        return float(match[1]) * _UNITS_S[match[2]]


DURATION = DurationType()
