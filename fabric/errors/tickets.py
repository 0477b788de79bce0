"""Tickets: what pays for a raw call, and why one is not taken."""

from __future__ import annotations

from fabric.errors.auth import AuthError
from fabric.errors.routing import DispatchError

_HOW = "get one with `fabric ticket`"


class TicketError(AuthError):
    """A raw call brought no ticket that pays for it here."""

    code = "ticket_error"


class TicketMissing(TicketError):
    """A raw call came without a ticket."""

    code = "missing_ticket"

    def __init__(self) -> None:
        super().__init__(f"The task has no ticket, without which nobody is charged; {_HOW}.")


class TicketInvalid(TicketError):
    """The ticket is not known or was revoked."""

    code = "invalid_ticket"

    def __init__(self) -> None:
        super().__init__(
            f"The ticket is not valid: it is unknown or was revoked; {_HOW}. An API key is not a"
            " ticket and never goes to a site."
        )


class TicketExpired(TicketError):
    """The ticket's time is over."""

    code = "expired_ticket"

    def __init__(self, *, expired_at: str) -> None:
        super().__init__(f"The ticket expired at {expired_at}; {_HOW}.", expired_at=expired_at)


class TicketForeign(TicketError):
    """The ticket is for another site."""

    code = "foreign_ticket"
    http_status = 403

    def __init__(self, *, site: str, here: str) -> None:
        super().__init__(
            f"The ticket is for the site {site!r} and this is {here!r}; get one for this site with"
            f" `fabric ticket --site {here}`.",
            site=site,
            here=here,
        )


class TicketSpent(TicketError):
    """What the ticket may cost in all does not cover this call."""

    code = "spent_ticket"
    http_status = 402

    def __init__(self, *, needed_usu: int, left_usu: int) -> None:
        super().__init__(
            f"The call may cost up to {needed_usu} micro-SU and the ticket has {left_usu} left;"
            f" lower max_tokens, or {_HOW}.",
            needed_usu=needed_usu,
            left_usu=left_usu,
        )


class HubNotConnected(DispatchError):
    """The instance cannot ask the hub, which alone can admit a raw call."""

    code = "hub_not_connected"
    http_status = 503

    def __init__(self, *, instance: str, reason: str) -> None:
        super().__init__(
            f"The instance {instance!r} cannot ask its hub, which must admit every raw call:"
            f" {reason}. Nothing was computed or charged; send it again later.",
            instance=instance,
            reason=reason,
        )
