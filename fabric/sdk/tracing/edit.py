"""A change of a weight that a run may carry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fabric.sdk.arrays import Array


@dataclass(frozen=True, eq=False)
class Edit:
    """A change of rank r to a weight W [out, in]: W + alpha · U Vᵀ.

    Args:
        weight: The parameter's name.
        u: [out, r].
        v: [in, r].
        alpha: Its strength.
    """

    weight: str
    u: Array
    v: Array
    alpha: float = 1.0
