"""What a choice of a replica is made of: sites and replicas that differ only where a test says."""

from __future__ import annotations

from typing import Any

from fabric.broker.select import Context, Offer, ReplicaSnapshot
from fabric.broker.settings import BrokerSettings
from fabric.messages import InstanceState, Request, Sampling, TextInput

DIGEST = "sha256:aa"


def replica(instance: str, site: str, **changes: Any) -> ReplicaSnapshot:
    """Return a ready and idle replica."""
    fields: dict[str, Any] = {
        "instance": instance,
        "site": site,
        "digest": DIGEST,
        "state": InstanceState.READY,
        "ejected": False,
        "context_tokens": 2048,
        "max_rows": 16,
        "num_busy": 0,
        "num_in_flight": 0,
    }
    return ReplicaSnapshot(**fields | changes)


def offer(site: str, **changes: Any) -> Offer:
    """Return what a request would cost at a site: a thousandth of what may be spent there."""
    fields: dict[str, Any] = {
        "site": site,
        "allocation": "allocation:astro:*",
        "available_usu": 1_000_000,
        "max_charge_usu": 1_000,
        "expected_charge_usu": 500,
    }
    return Offer(**fields | changes)


def context(*offers: Offer, **changes: Any) -> Context:
    """Return what a choice knows beside the replicas; by default of ``alpha`` and ``beta``."""
    fields: dict[str, Any] = {
        "model": "smol@1",
        "digest": DIGEST,
        "offers": {one.site: one for one in offers or (offer("alpha"), offer("beta"))},
        "remaining_s": 300.0,
        "settings": BrokerSettings(),
    }
    return Context(**fields | changes)


def request(**changes: Any) -> Request:
    """Return a request that may run anywhere."""
    fields: dict[str, Any] = {
        "id": "run_1",
        "model": "smol",
        "input": TextInput(text="Why is the sky dark at night?"),
        "sampling": Sampling(max_tokens=32),
    }
    return Request(**fields | changes)
