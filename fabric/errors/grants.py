"""What a caller may see and not do, and how much of it."""

from __future__ import annotations

from collections.abc import Sequence

from fabric.errors.admission import AdmissionError, TooManyRequests
from fabric.errors.auth import AuthError
from fabric.errors.base import FabricError


class NotGranted(AuthError):
    """The caller knows the object and has no grant to do this with it."""

    code = "not_granted"
    http_status = 403

    def __init__(
        self,
        *,
        project: str,
        model: str,
        modes: Sequence[str],
        tier: str | None = None,
        sites: Sequence[str] = (),
    ) -> None:
        what = f"{', '.join(modes)} with the model {model!r}"
        where = f" at {', '.join(sites)}" if sites else ""
        urgency = "" if tier is None else f" in the tier {tier!r}"
        super().__init__(
            f"The project {project!r} has no grant for {what}{where}{urgency}; ask an administrator"
            " (`fabric-admin grant add`), or ask for less.",
            project=project,
            model=model,
            modes=list(modes),
            tier=tier,
            sites=list(sites),
        )


class DataStays(NotGranted):
    """The project's data may not go where the request would run."""

    code = "data_stays"

    def __init__(self, *, project: str, homes: Sequence[str], asked: Sequence[str]) -> None:
        FabricError.__init__(
            self,
            f"Data of the project {project!r} may go to {', '.join(homes) or 'no site'} alone, not"
            f" to {', '.join(asked)}; leave `sites` out, or ask an administrator"
            " (`fabric-admin project modify`).",
            project=project,
            homes=list(homes),
            asked=list(asked),
        )


class RateLimited(TooManyRequests):
    """Requests or tokens of the last minute have reached their limit."""

    code = "rate_limit_exceeded"

    def __init__(self, *, what: str, shared_by: str, limit: int, retry_after_s: float) -> None:
        FabricError.__init__(
            self,
            f"The limit of {limit} {what} a minute is reached (of {shared_by}); retry in"
            f" {retry_after_s:.3g} s, or ask an administrator for more (`fabric-admin limit`).",
            what=what,
            shared_by=shared_by,
            limit=limit,
            retry_after_s=retry_after_s,
        )


class RequestOverLimit(AdmissionError):
    """One request alone could take more tokens than there are in a minute."""

    code = "request_over_limit"
    http_status = 429

    def __init__(self, *, needed: int, shared_by: str, limit: int) -> None:
        super().__init__(
            f"The request may take {needed} tokens, which is over the limit of {limit} a minute (of"
            f" {shared_by}); lower max_tokens, shorten the prompt, or send less at once.",
            param="max_tokens",
            needed=needed,
            shared_by=shared_by,
            limit=limit,
        )
