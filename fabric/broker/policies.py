"""What a user may want of the choice, as data: a weight for each part of the expected cost."""

from __future__ import annotations

from collections.abc import Mapping

from fabric.messages import Request

Weights = Mapping[str, float]

POLICIES: Mapping[str, Weights] = {
    "balanced": {"queue": 1.0, "service": 1.0, "data": 1.0, "price": 1.0, "risk": 1.0},
    "fastest": {"queue": 1.0, "service": 1.0, "data": 1.0, "price": 0.0, "risk": 1.0},
    "cheapest": {"queue": 0.05, "service": 0.05, "data": 0.05, "price": 20.0, "risk": 1.0},
    "local-only": {"queue": 1.0, "service": 1.0, "data": 1.0, "price": 1.0, "risk": 1.0},
}


def get_weights(request: Request) -> Weights:
    """Return the weights of the request's policy; those that the user gives replace them."""
    weights = POLICIES[request.policy]
    if not request.weights:
        return weights
    own: dict[str, float] = dict(request.weights.items())
    return {**weights, **own}
