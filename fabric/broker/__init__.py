"""The broker: admits requests, chooses where they run, and sees each one to its single end.

``select`` and ``state`` are pure; ``admit`` and ``loop`` do the I/O.
"""

from fabric.broker.attainment import Attained
from fabric.broker.estimate import Duration, Estimate, SiteEstimate
from fabric.broker.limits import Standing
from fabric.broker.line import Waiting
from fabric.broker.loop import Broker
from fabric.broker.observe import Observer
from fabric.broker.replicas import ReplicaView
from fabric.broker.run import Run
from fabric.broker.settings import BrokerSettings
from fabric.broker.tiers import (
    PROMISES,
    Promise,
    Tier,
    get_factors,
    get_promises,
    parameters_of,
    tier_of,
)

__all__ = [
    "PROMISES",
    "Attained",
    "Broker",
    "BrokerSettings",
    "Duration",
    "Estimate",
    "Observer",
    "Promise",
    "ReplicaView",
    "Run",
    "SiteEstimate",
    "Standing",
    "Tier",
    "Waiting",
    "get_factors",
    "get_promises",
    "parameters_of",
    "tier_of",
]
