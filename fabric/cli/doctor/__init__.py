"""What ``fabric-admin doctor`` looks at: one small check a question, all behind one protocol."""

from fabric.cli.doctor.books import BooksCheck
from fabric.cli.doctor.check import Check, Finding, examine
from fabric.cli.doctor.checks import get_checks
from fabric.cli.doctor.cluster import BalanceCheck, SchedulerCheck
from fabric.cli.doctor.globus import EndpointCheck, QueueCheck, ServiceCheck
from fabric.cli.doctor.here import DiskCheck, PackagesCheck
from fabric.cli.doctor.network import ClockCheck, HubCheck, TokenCheck
from fabric.cli.doctor.site import ConfigurationCheck
from fabric.cli.doctor.weights import WeightsCheck

__all__ = [
    "BalanceCheck",
    "BooksCheck",
    "Check",
    "ClockCheck",
    "ConfigurationCheck",
    "DiskCheck",
    "EndpointCheck",
    "Finding",
    "HubCheck",
    "PackagesCheck",
    "QueueCheck",
    "SchedulerCheck",
    "ServiceCheck",
    "TokenCheck",
    "WeightsCheck",
    "examine",
    "get_checks",
]
