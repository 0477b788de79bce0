"""Requests that are refused before any work is done."""

from __future__ import annotations

from collections.abc import Sequence

from fabric.errors.base import FabricError


class AdmissionError(FabricError):
    """The request was refused before any work was done or charged."""

    code = "admission_error"
    http_status = 400


class RequestInvalid(AdmissionError):
    """A parameter of the request cannot be used."""

    code = "invalid_parameter"

    def __init__(self, *, param: str, value: object, reason: str) -> None:
        shown = repr(value)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        super().__init__(
            f"The parameter {param!r} cannot be {shown}: {reason}.",
            param=param,
            value=shown,
            reason=reason,
        )


class UnknownParameter(RequestInvalid):
    """The request has a parameter nobody declared."""

    code = "unknown_parameter"

    def __init__(self, *, param: str) -> None:
        AdmissionError.__init__(
            self,
            f"The parameter {param!r} is not known here; check its spelling, or leave it out.",
            param=param,
        )


class UnsupportedParameter(RequestInvalid):
    """A parameter that other services know has a value that cannot be honoured here."""

    code = "unsupported_parameter"


class ConstraintInvalid(RequestInvalid):
    """What a request says its answer must be cannot be read, met or afforded."""

    code = "invalid_constraint"

    def __init__(self, *, kind: str, reason: str) -> None:
        AdmissionError.__init__(
            self,
            f"The answer cannot be held to the request's {kind.replace('_', ' ')}: {reason}."
            " Correct it, or make it simpler.",
            param="response_format" if kind == "json_schema" else f"fabric.{kind}",
            kind=kind,
            reason=reason,
        )


class BodyInvalid(AdmissionError):
    """The body is not a JSON object in UTF-8."""

    code = "invalid_body"

    def __init__(self, *, reason: str) -> None:
        super().__init__(
            f"The request body cannot be read: {reason}; send one JSON object in UTF-8.",
            reason=reason,
        )


class UnknownModel(AdmissionError):
    """No catalogued model has this name or revision."""

    code = "model_not_found"
    http_status = 404

    def __init__(self, *, model: str, known: Sequence[str]) -> None:
        super().__init__(
            f"The model {model!r} is not in the catalog; known models:"
            f" {', '.join(known) or 'none'}."
            " `fabric models` lists them.",
            param="model",
            model=model,
            known=list(known),
        )


class UnknownSite(AdmissionError):
    """No catalogued site has this name."""

    code = "site_not_found"
    http_status = 404

    def __init__(self, *, site: str, known: Sequence[str]) -> None:
        super().__init__(
            f"The site {site!r} is not in the catalog; known sites: {', '.join(known) or 'none'}."
            " `fabric sites` lists them.",
            param="site",
            site=site,
            known=list(known),
        )


class ContextExceeded(AdmissionError):
    """Prompt and requested output do not fit the model's context."""

    code = "context_length_exceeded"

    def __init__(self, *, prompt_tokens: int, max_tokens: int, context_tokens: int) -> None:
        super().__init__(
            f"The prompt has {prompt_tokens} tokens and {max_tokens} more were asked for, but the"
            f" model's context is {context_tokens} tokens; shorten the prompt or lower max_tokens.",
            param="prompt",
            prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
            context_tokens=context_tokens,
        )


class BodyTooLarge(AdmissionError):
    """The body is over the hub's cap."""

    code = "body_too_large"
    http_status = 413

    def __init__(self, *, limit_bytes: int) -> None:
        super().__init__(
            f"The request body is over the cap of {limit_bytes} bytes; send less, or pass large"
            " data by reference.",
            limit_bytes=limit_bytes,
        )


class TooManyRequests(AdmissionError):
    """The caller, or its project, has as many requests in flight as it may have."""

    code = "too_many_requests"
    http_status = 429
    retryable = True

    def __init__(self, *, limit: int, retry_after_s: float, shared_by: str = "this key") -> None:
        super().__init__(
            f"There are already {limit} requests in flight for {shared_by}; wait for some to end,"
            f" or retry in {retry_after_s:g} s.",
            limit=limit,
            shared_by=shared_by,
            retry_after_s=retry_after_s,
        )


class Duplicate(AdmissionError):
    """An object of this name exists already."""

    code = "already_exists"
    http_status = 409

    def __init__(self, *, kind: str, name: str) -> None:
        article = "an" if kind.startswith(tuple("aeiou")) else "a"
        super().__init__(
            f"There is already {article} {kind} {name!r}; choose another name, or modify that one.",
            kind=kind,
            name=name,
        )
