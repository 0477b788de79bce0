"""What a project has left at a centre, asked of the centre's own accounting."""

from fabric.launch.balances.command import CommandBalance
from fabric.launch.balances.iri import FacilityBalance
from fabric.launch.balances.protocol import Balance, BalanceSource
from fabric.launch.balances.slurm import SlurmBalance
from fabric.launch.balances.sources import get_balance_source

__all__ = [
    "Balance",
    "BalanceSource",
    "CommandBalance",
    "FacilityBalance",
    "SlurmBalance",
    "get_balance_source",
]
