"""Double-entry accounts in integer micro-SU: what is granted, held, charged and returned."""

from fabric.ledger.ledger import Ledger
from fabric.ledger.rates import TIERS, Rate, charge_usu, max_charge_usu
from fabric.ledger.records import (
    AllocationBalance,
    Hold,
    HoldState,
    JobCharge,
    Settlement,
    Statement,
    StatementLine,
)

__all__ = [
    "TIERS",
    "AllocationBalance",
    "Hold",
    "HoldState",
    "JobCharge",
    "Ledger",
    "Rate",
    "Settlement",
    "Statement",
    "StatementLine",
    "charge_usu",
    "max_charge_usu",
]
