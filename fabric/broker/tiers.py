"""Tiers: what each promises, and how much of a project's share it gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

from fabric.messages import Request

Tier = Literal["interactive", "standard", "introspection", "batch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """What a tier promises, and to how many of its requests.

    Args:
        weight: Its part of a project's share; 0 is work for idle capacity alone.
        first_token_s: From admission to the first token.
        token_s: From one token to the next, on average over a request.
        share_in_time: The part of the requests for which these two hold.
        share_answered: The part that is answered at all (of batch work: before its deadline).
        admit_s: When the first token must be expected for a request to be admitted; without it
            only the request's own deadline counts.
    """

    weight: float
    first_token_s: float | None
    token_s: float | None
    share_answered: float
    share_in_time: float = 0.95
    admit_s: float | None = None


PROMISES: Final[Mapping[Tier, Promise]] = MappingProxyType(
    {
        "interactive": Promise(
            weight=4.0, first_token_s=2.0, token_s=0.08, share_answered=0.995, admit_s=2.0
        ),
        "standard": Promise(weight=2.0, first_token_s=10.0, token_s=0.15, share_answered=0.99),
        "introspection": Promise(
            weight=1.0, first_token_s=30.0, token_s=None, share_answered=0.98, admit_s=30.0
        ),
        "batch": Promise(weight=0.0, first_token_s=None, token_s=None, share_answered=0.95),
    }
)
"""What is promised where the replicas are warm; the admission of a request keeps it honest."""


def tier_of(request: Request) -> Tier:
    """Return the tier whose promise a request has: programs have one of their own, whatever they
    pay, unless they are batch work."""
    if request.mode == "program" and request.tier != "batch":
        return "introspection"
    return request.tier
