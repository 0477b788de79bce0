"""Instances in jobs of a user's own: planned, submitted, watched, handed over and ended."""

from fabric.launch.jobs.order import Order, Sharing
from fabric.launch.jobs.plan import LaunchPlan, get_launch_plan
from fabric.launch.jobs.records import JobRecord, LaunchFolder, LaunchRecord

__all__ = [
    "JobRecord",
    "LaunchFolder",
    "LaunchPlan",
    "LaunchRecord",
    "Order",
    "Sharing",
    "get_launch_plan",
]
