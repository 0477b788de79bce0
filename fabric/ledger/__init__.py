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
from fabric.ledger.records import (
    AllocationBalance,
    Hold,
    HoldState,
    Refund,
    Settlement,
    Statement,
    StatementLine,
)

__all__ = [
    "PRICES",
    "TIERS",
    "AllocationBalance",
    "Hold",
    "HoldState",
    "Ledger",
    "Rate",
    "Refund",
    "Settlement",
    "Statement",
    "StatementLine",
    "charge_usu",
    "kv_block_s_bound",
    "max_charge_usu",
    "price_usu",
]
