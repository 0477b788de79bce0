"""What a project has left at a centre, asked of the centre's own accounting."""

from fabric.launch.balances.accounts import AccountsBalance
from fabric.launch.balances.iri import FacilityBalance
from fabric.launch.balances.mybalance import MybalanceBalance
from fabric.launch.balances.protocol import Balance, BalanceSource
from fabric.launch.balances.sbank import SbankBalance
from fabric.launch.balances.showusage import ShowusageBalance
from fabric.launch.balances.slurm import SlurmBalance
from fabric.launch.balances.sources import get_balance_source
from fabric.launch.balances.taccinfo import TaccinfoBalance

__all__ = [
    "AccountsBalance",
    "Balance",
    "BalanceSource",
    "FacilityBalance",
    "MybalanceBalance",
    "SbankBalance",
    "ShowusageBalance",
    "SlurmBalance",
    "TaccinfoBalance",
    "get_balance_source",
]
