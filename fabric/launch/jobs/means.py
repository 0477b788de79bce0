"""Whether an account can pay for a launch: its balance at the centre, the charge, what is left."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal

from fabric.config import SiteSpec
from fabric.errors import AllocationTooSmall, FabricError, SettingInvalid
from fabric.launch.balances import Balance
from fabric.launch.jobs.plan import LaunchPlan

AskBalance = Callable[[SiteSpec, str], Balance]


@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """What an account has left beside what a launch may take.

    Args:
        account: Whose; ``None`` if nobody named one.
        charge: What all jobs of the launch cost at their longest, in the machine's unit; ``None``
            where its file does not say.
        unit: That unit.
        balance: What the centre tells; ``None`` if it was not asked, or did not say.
        unknown: Why there is no balance, or why it cannot be compared with the charge.
        failed: Whether the centre was asked and did not say.
    """

    account: str | None
    charge: float | None
    unit: str
    balance: Balance | None = None
    unknown: str = ""
    failed: bool = False

    @property
    def remains(self) -> Decimal | None:
        """What is left of the balance when all jobs have run; ``None`` if that is not known."""
        if self.balance is None or self.charge is None or self.unknown:
            return None
        return self.balance.available - Decimal(str(self.charge))

    def check(self, machine: str) -> None:
        """Refuse a launch that may take more than there is.

        Raises:
            AllocationTooSmall: It may.
        """
        if self.remains is not None and self.remains < 0:
            assert self.balance is not None
            raise AllocationTooSmall(
                account=str(self.account),
                machine=machine,
                available=float(self.balance.available),
                charge=float(self.charge or 0.0),
                unit=self.unit,
            )


def get_means(plan: LaunchPlan, ask: AskBalance) -> Means:
    """Return what the account of a plan has left. A centre that does not say is no error.

    Args:
        plan: What is to be paid for.
        ask: Asks the centre for an account's balance.
    """
    endpoint = plan.site.endpoint
    account = plan.order.account or (endpoint.account if endpoint else None)
    charge, unit = plan.total_charge, plan.unit
    known = Means(account=account, charge=charge, unit=unit)
    if account is None:
        return _without(known, "not asked: no account is named (--account)")
    try:
        balance = ask(plan.site, account)
    except SettingInvalid as error:
        return _without(known, f"not asked: {error.detail['reason']}")
    except FabricError as error:
        return _without(known, error.message.rstrip("."), failed=True)
    odd = charge is not None and _plain(balance.unit) != _plain(unit)
    why = f"the centre counts {balance.unit} and the charge is in {unit}s" if odd else ""
    return Means(account=account, charge=charge, unit=unit, balance=balance, unknown=why)


def _without(known: Means, why: str, *, failed: bool = False) -> Means:
    return Means(
        account=known.account, charge=known.charge, unit=known.unit, unknown=why, failed=failed
    )


def _plain(unit: str) -> str:
    """Return a unit as it compares: ``node-hours`` is ``node hour``."""
    return " ".join(word.removesuffix("s") for word in unit.lower().replace("-", " ").split())
