"""Where a request may run, and how messages get there: placement and dispatch."""

from __future__ import annotations

from collections.abc import Mapping

from fabric.errors.base import FabricError


class PlacementError(FabricError):
    """No place may or can serve the request now."""

    code = "placement_error"
    http_status = 503


class NoReplica(PlacementError):
    """Every candidate was filtered out; ``detail['reasons']`` says why, by instance."""

    code = "no_replica"
    retryable = True

    def __init__(
        self, *, model: str, reasons: Mapping[str, str], retry_after_s: float = 5.0
    ) -> None:
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        super().__init__(
            f"No replica of {model!r} can take the request ({why or 'none has joined'}); retry in"
            f" {retry_after_s:g} s, or see `fabric explain`.",
            model=model,
            reasons=dict(reasons),
            retry_after_s=retry_after_s,
        )


class Overloaded(PlacementError):
    """So much waits already that the answer is predicted to come too late."""

    code = "overloaded"
    retryable = True

    def __init__(
        self,
        *,
        model: str,
        tier: str,
        what: str,
        predicted_s: float,
        limit_s: float,
        retry_after_s: float,
    ) -> None:
        super().__init__(
            f"{model!r} is too busy for this {tier} request: its {what} is predicted in"
            f" {predicted_s:g} s, and {limit_s:g} s is the limit; retry in {retry_after_s:g} s,"
            " allow more time with deadline_s, or ask for another tier.",
            model=model,
            tier=tier,
            what=what,
            predicted_s=predicted_s,
            limit_s=limit_s,
            retry_after_s=retry_after_s,
        )


class TierNotHeld(PlacementError):
    """No replica is fast enough for what the tier promises, busy or not."""

    code = "tier_not_held"
    retryable = False

    def __init__(self, *, tier: str, predicted_s: float, limit_s: float) -> None:
        super().__init__(
            f"The first token of this request is predicted in {predicted_s:.1f} s even where nobody"
            f" waits, and the tier {tier!r} promises {limit_s:g} s; ask for the tier 'standard', or"
            " send a shorter prompt.",
            tier=tier,
            predicted_s=round(predicted_s, 3),
            limit_s=limit_s,
        )


class DeadlineExceeded(PlacementError):
    """The request's deadline passed before it was done."""

    code = "deadline_exceeded"
    http_status = 504

    def __init__(self, *, deadline_s: float, attempts: int) -> None:
        super().__init__(
            f"The deadline of {deadline_s:g} s passed after {attempts} attempt(s); allow more time"
            " with deadline_s, or ask for fewer tokens.",
            deadline_s=deadline_s,
            attempts=attempts,
        )


class DispatchError(FabricError):
    """A message between processes did not get through."""

    code = "dispatch_error"
    http_status = 502
    retryable = True


class SessionLost(DispatchError):
    """The connection to the instance ended while it had work."""

    code = "session_lost"

    def __init__(self, *, instance: str, reason: str) -> None:
        super().__init__(
            f"The connection to the instance {instance!r} was lost: {reason}. The request may be"
            " sent again.",
            instance=instance,
            reason=reason,
        )


class SessionRefused(DispatchError):
    """The hub does not accept this instance's session."""

    code = "session_refused"
    retryable = False

    def __init__(self, *, reason: str) -> None:
        super().__init__(f"The hub refused the session: {reason}.", reason=reason)


class FirstTokenTimeout(DispatchError):
    """The instance accepted the request and then said nothing."""

    code = "first_token_timeout"
    http_status = 504

    def __init__(self, *, instance: str, timeout_s: float) -> None:
        super().__init__(
            f"The instance {instance!r} sent nothing for {timeout_s:g} s; it may be overloaded or"
            " stuck. The request may be sent again.",
            instance=instance,
            timeout_s=timeout_s,
        )


class StreamBroken(DispatchError):
    """Output already sent cannot be continued exactly elsewhere."""

    code = "stream_broken"
    retryable = False

    def __init__(
        self,
        *,
        instance: str,
        num_tokens: int,
        cause: str,
        why: str = "it was sampled without a seed; send it again, with a seed if it should"
        " survive such a loss",
    ) -> None:
        super().__init__(
            f"The stream broke after {num_tokens} token(s) from {instance!r} ({cause}) and cannot"
            f" be continued exactly, because {why}.",
            instance=instance,
            num_tokens=num_tokens,
            cause=cause,
        )


class RequestCancelled(DispatchError):
    """The caller went away or cancelled."""

    code = "request_cancelled"
    http_status = 499
    retryable = False

    def __init__(self) -> None:
        super().__init__("The request was cancelled by its caller; what was computed is charged.")


class ProtocolViolation(DispatchError):
    """A peer sent a frame that does not belong here."""

    code = "protocol_violation"
    retryable = False

    def __init__(self, *, peer: str, reason: str) -> None:
        super().__init__(
            f"{peer} sent a frame that does not follow the session protocol: {reason}.",
            peer=peer,
            reason=reason,
        )


class HubOutOfReach(DispatchError):
    """An instance cannot reach the hub that it should join."""

    code = "hub_out_of_reach"
    http_status = 503

    def __init__(self, *, url: str, reason: str, waited_s: float) -> None:
        super().__init__(
            f"The instance could not reach the hub at {url} from its node for {waited_s:g} s"
            f" ({reason}), so it ends. Compute nodes may need a proxy or another address: see"
            " `network` in the machine's site file, and FABRIC_BASE_URL.",
            url=url,
            reason=reason,
            waited_s=waited_s,
        )


class HubUnreachable(DispatchError):
    """The client cannot reach the hub."""

    code = "hub_unreachable"
    http_status = 503

    def __init__(self, *, url: str, reason: str) -> None:
        super().__init__(
            f"The hub at {url} cannot be reached ({reason}); check the address with `fabric config"
            " show`, or start a local federation with `fabric up`.",
            url=url,
            reason=reason,
        )
