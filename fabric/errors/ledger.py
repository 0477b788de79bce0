"""What an account, or the database under it, does not allow."""

from __future__ import annotations

from collections.abc import Sequence

from fabric.errors.base import FabricError


class LedgerError(FabricError):
    """An account does not allow the entry."""

    code = "ledger_error"
    http_status = 409


class InsufficientBalance(LedgerError):
    """The allocation cannot cover the largest charge the request may cause."""

    code = "insufficient_balance"
    http_status = 402

    def __init__(self, *, account: str, needed_usu: int, available_usu: int) -> None:
        super().__init__(
            f"The account {account!r} has {available_usu} micro-SU available and the request may"
            f" cost up to {needed_usu}; lower max_tokens, or ask for a larger allocation"
            " (`fabric usage` shows the statement).",
            account=account,
            needed_usu=needed_usu,
            available_usu=available_usu,
        )


class UnknownAccount(LedgerError):
    """No such account."""

    code = "unknown_account"
    http_status = 404

    def __init__(self, *, account: str) -> None:
        super().__init__(
            f"There is no account {account!r}; `fabric-admin alloc show` lists allocations.",
            account=account,
        )


class HoldNotOpen(LedgerError):
    """The hold was never made, or was already settled or voided otherwise."""

    code = "hold_not_open"

    def __init__(self, *, hold: str, state: str) -> None:
        super().__init__(
            f"The hold {hold!r} is {state}; a hold is settled or voided once.",
            hold=hold,
            state=state,
        )


class AllocationClosed(LedgerError):
    """The allocation's time has not come, or is over."""

    code = "allocation_closed"
    http_status = 402

    def __init__(self, *, account: str, starts_at: str | None, ends_at: str | None) -> None:
        super().__init__(
            f"The allocation {account!r} cannot be used now: it is open from {starts_at or 'ever'}"
            f" until {ends_at or 'ever'}; use another, or ask for it to be extended.",
            account=account,
            starts_at=starts_at,
            ends_at=ends_at,
        )


class ChargeExceedsHold(LedgerError):
    """A charge is more than what was held for it; nothing was charged."""

    code = "charge_exceeds_hold"
    http_status = 500

    def __init__(self, *, hold: str, amount_usu: int, held_usu: int) -> None:
        super().__init__(
            f"A charge of {amount_usu} micro-SU was asked of the hold {hold!r}, which holds"
            f" {held_usu}; the usage reported by the site is not plausible. Nothing was charged.",
            hold=hold,
            amount_usu=amount_usu,
            held_usu=held_usu,
        )


class NotCharged(LedgerError):
    """A refund was asked for a run that was not charged."""

    code = "not_charged"

    def __init__(self, *, run: str) -> None:
        super().__init__(
            f"The run {run!r} was not charged, so nothing of it can be given back;"
            " `fabric-admin alloc statement PROJECT` lists what was charged.",
            run=run,
        )


class RefundExceedsCharge(LedgerError):
    """More was to be given back than was charged; nothing was."""

    code = "refund_exceeds_charge"

    def __init__(self, *, run: str, amount_usu: int, charged_usu: int, refunded_usu: int) -> None:
        super().__init__(
            f"A refund of {amount_usu} micro-SU was asked for the run {run!r}, which was charged"
            f" {charged_usu} and given back {refunded_usu}; refund at most the difference.",
            run=run,
            amount_usu=amount_usu,
            charged_usu=charged_usu,
            refunded_usu=refunded_usu,
        )


class UnknownUnit(LedgerError):
    """Nobody has said what this unit is worth at that time."""

    code = "unknown_unit"
    http_status = 404

    def __init__(self, *, unit: str, at: str) -> None:
        super().__init__(
            f"Nobody has said what the unit {unit!r} is worth on {at}; `fabric-admin rate unit add`"
            " does.",
            unit=unit,
            at=at,
        )


class MeasurementInsufficient(LedgerError):
    """The runs on record do not determine what is asked of them."""

    code = "measurement_insufficient"

    def __init__(self, *, model: str, site: str, num_runs: int, reason: str) -> None:
        super().__init__(
            f"The {num_runs} runs of {model!r} at {site!r} do not tell what a token takes:"
            f" {reason}. Let more, and more different, requests run there, or widen the period.",
            model=model,
            site=site,
            num_runs=num_runs,
            reason=reason,
        )


class RateMissing(LedgerError):
    """Nobody has set what this model costs at this site."""

    code = "rate_missing"
    http_status = 503

    def __init__(self, *, model: str, site: str) -> None:
        super().__init__(
            f"No rate is set for the model {model!r} at the site {site!r}, and no default; an"
            " administrator sets one (site '*' and model '*' are the default).",
            model=model,
            site=site,
        )


class LedgerInconsistent(LedgerError):
    """The books do not add up. Stop, and restore or repair before going on."""

    code = "ledger_inconsistent"
    http_status = 500

    def __init__(self, *, problems: Sequence[str]) -> None:
        super().__init__(
            f"The ledger does not add up: {'; '.join(problems)}. Stop the hub and restore its"
            " database before anything else is charged.",
            problems=list(problems),
        )


class StorageFull(LedgerError):
    """The database cannot grow; the transaction was undone."""

    code = "storage_full"
    http_status = 507

    def __init__(self, *, reason: str) -> None:
        super().__init__(
            f"The hub's database cannot be written ({reason}); nothing was charged or recorded."
            " Free space on its disk and try again.",
            reason=reason,
        )


class StorageBusy(LedgerError):
    """Another process kept the database locked; the transaction was undone."""

    code = "storage_busy"
    http_status = 503
    retryable = True

    def __init__(self, *, reason: str) -> None:
        super().__init__(
            f"The hub's database is kept busy by another process ({reason}); nothing was charged"
            " or recorded. Try again.",
            reason=reason,
        )
