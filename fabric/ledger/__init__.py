"""Double-entry accounts in integer micro-SU: what is granted, held, charged and returned."""

from fabric.ledger.ledger import Ledger
from fabric.ledger.rates import (
    PRICES,
    TIERS,
    Rate,
    charge_usu,
    kv_block_s_bound,
    max_charge_usu,
    price_usu,
)
from fabric.ledger.reconcile import Billed, EndedJob, Overhead, Reconciliation, reconcile
from fabric.ledger.records import (
    AllocationBalance,
    Hold,
    HoldState,
    JobCharge,
    Refund,
    Settlement,
    Statement,
    StatementLine,
)
from fabric.ledger.units import Unit

__all__ = [
    "PRICES",
    "TIERS",
    "AllocationBalance",
    "Billed",
    "EndedJob",
    "Hold",
    "HoldState",
    "JobCharge",
    "Ledger",
    "Overhead",
    "Rate",
    "Reconciliation",
    "Refund",
    "Settlement",
    "Statement",
    "StatementLine",
    "Unit",
    "charge_usu",
    "kv_block_s_bound",
    "max_charge_usu",
    "price_usu",
    "reconcile",
]
