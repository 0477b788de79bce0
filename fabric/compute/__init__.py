"""The Globus Compute client: service limits, executors, registered functions."""

from fabric.compute.limits import RequestBudget, ServiceLimits
from fabric.compute.pool import ComputePool
from fabric.compute.status import EndpointStatus
from fabric.compute.target import JSON, ComputeTarget

__all__ = [
    "JSON",
    "ComputePool",
    "ComputeTarget",
    "EndpointStatus",
    "RequestBudget",
    "ServiceLimits",
]
