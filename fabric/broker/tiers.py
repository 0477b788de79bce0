"""Tiers: what each promises, what it costs, and how much of a project's share it gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from types import MappingProxyType
from typing import Final, Literal

from fabric.auth import TierTerms
from fabric.ledger import TIERS
from fabric.messages import Request

Factors = Mapping[str, Decimal]
"""What each tier multiplies a charge by."""

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
"""What the release promises where the replicas are warm; admission keeps it honest."""


def parameters_of(tier: Tier) -> frozenset[str]:
    """Return what can be changed of a tier: the fields of ``TierTerms`` that it has."""
    promise = PROMISES[tier]
    has = {
        "charge_factor": tier in TIERS,
        "weight": promise.weight > 0,
        "first_token_s": promise.first_token_s is not None,
        "token_s": promise.token_s is not None,
        "share_in_time": promise.first_token_s is not None,
        "share_answered": True,
    }
    return frozenset(name for name, is_there in has.items() if is_there)


def get_promises(changed: Mapping[str, TierTerms]) -> Mapping[Tier, Promise]:
    """Return what is promised, with what administrators changed; what a tier does not have it does
    not get. A request is admitted by the first token that its tier promises, if by any."""
    return {
        tier: _changed(tier, promise, changed[tier]) if tier in changed else promise
        for tier, promise in PROMISES.items()
    }


def get_factors(changed: Mapping[str, TierTerms]) -> Factors:
    """Return what each tier multiplies a charge by, with what administrators changed."""
    if not changed:
        return TIERS
    own = {tier: terms.charge_factor for tier, terms in changed.items() if tier in TIERS}
    return {tier: own.get(tier) or factor for tier, factor in TIERS.items()}


def _changed(tier: Tier, promise: Promise, terms: TierTerms) -> Promise:
    names = parameters_of(tier) - {"charge_factor"}
    new = {name: value for name in names if (value := getattr(terms, name)) is not None}
    if promise.admit_s is not None and "first_token_s" in new:
        new["admit_s"] = new["first_token_s"]
    return replace(promise, **new)


def tier_of(request: Request) -> Tier:
    """Return the tier whose promise a request has: programs have one of their own, whatever they
    pay, unless they are batch work."""
    if request.mode == "program" and request.tier != "batch":
        return "introspection"
    return request.tier
