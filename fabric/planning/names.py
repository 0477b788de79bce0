"""Finds what a name means, or what it was meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


def resolve(name: str, known: Mapping[str, T], aliases: Mapping[str, T]) -> tuple[T | None, str]:
    """Return what a name means, and if it means nothing the known name that is nearest.

    Args:
        name: As it was typed; case and surrounding space do not matter.
        known: What there is.
        aliases: Further names of it, in lower case.
    """
    wanted = name.strip().lower()
    folded = {key.lower(): key for key in known}
    if wanted in folded:
        return known[folded[wanted]], ""
    if wanted in aliases:
        return aliases[wanted], ""
    near = difflib.get_close_matches(wanted, folded, n=1, cutoff=0.5)
    return None, folded[near[0]] if near else ""
