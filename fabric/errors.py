"""The one taxonomy of errors.

Every error that crosses a room, a process or the wire is one of these::

    FabricError
    ├── ConfigError          SettingInvalid, PortInUse, AlreadyRunning, NotRunning
    ├── AuthError            KeyMissing, KeyInvalid, KeyExpired, PermissionDenied, NotFound
    ├── AdmissionError       RequestInvalid, UnknownModel, UnknownSite, ContextExceeded,
    │                        BodyTooLarge, TooManyRequests, Duplicate
    ├── PlacementError       NoReplica, DeadlineExceeded
    ├── DispatchError        SessionLost, SessionRefused, FirstTokenTimeout, StreamBroken,
    │                        RequestCancelled, ProtocolViolation, HubUnreachable
    ├── LaunchError          BlockFailed, CanaryFailed
    ├── EngineError          ModelNotLoadable, RowFailed, CacheExhausted, EngineStopped
    ├── ProgramError
    ├── PayloadError
    ├── VersionError         DigestMismatch
    └── LedgerError          InsufficientBalance, UnknownAccount, HoldNotOpen

An error class carries ``code`` (stable, for programs), ``http_status`` and ``retryable`` (may the
same request succeed elsewhere or later?). Instances carry ``message`` (a full sentence: what, which
value, what to do) and ``detail`` (JSON-safe fields). Across processes goes ``Failure``
(``fabric.messages``), which is rebuilt here by code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar


class FabricError(Exception):
    """Root of the taxonomy.

    Args:
        message: What happened, to which value, and what to do about it.
        **detail: The values as JSON-safe fields.
    """

    code: ClassVar[str] = "internal_error"
    http_status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False
    _by_code: ClassVar[dict[str, type[FabricError]]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        FabricError._by_code[cls.code] = cls

    def __init__(self, message: str, /, **detail: object) -> None:
        super().__init__(message)
        self.message = message
        self.detail: dict[str, object] = detail

    @staticmethod
    def rebuild(code: str, message: str, detail: Mapping[str, object]) -> FabricError:
        """Return the error a peer reported; an unknown code becomes a plain ``FabricError``."""
        cls = FabricError._by_code.get(code, FabricError)
        error = cls.__new__(cls)
        FabricError.__init__(error, message, **dict(detail))
        return error


# ---- Config -------------------------------------------------------------------------------------


class ConfigError(FabricError):
    """A setting, a file or the state of this machine does not allow the command."""

    code = "config_error"
    http_status = 500


class SettingInvalid(ConfigError):
    """A setting has a value that cannot be used."""

    code = "setting_invalid"

    def __init__(self, *, setting: str, value: object, reason: str, source: str = "") -> None:
        where = f" (from {source})" if source else ""
        super().__init__(
            f"The setting {setting!r} has the value {value!r}{where}, which cannot be used:"
            f" {reason}.",
            setting=setting,
            value=str(value),
            reason=reason,
            source=source,
        )


class PortInUse(ConfigError):
    """Another process listens on the port the hub was given."""

    code = "port_in_use"

    def __init__(self, *, host: str, port: int) -> None:
        super().__init__(
            f"Port {port} on {host} is in use by another process; stop that process or choose"
            " another port with --port.",
            host=host,
            port=port,
        )


class AlreadyRunning(ConfigError):
    """A federation is already up in this state directory."""

    code = "already_running"

    def __init__(self, *, url: str, state_dir: str) -> None:
        super().__init__(
            f"A federation is already up at {url} (state in {state_dir}); use it, end it with"
            " `fabric down`, or choose another --state-dir.",
            url=url,
            state_dir=state_dir,
        )


class NotRunning(ConfigError):
    """No federation is up in this state directory."""

    code = "not_running"

    def __init__(self, *, state_dir: str) -> None:
        super().__init__(
            f"No federation is up (state directory {state_dir}); start one with `fabric up`.",
            state_dir=state_dir,
        )


# ---- Auth ---------------------------------------------------------------------------------------


class AuthError(FabricError):
    """The caller could not be identified or may not do this."""

    code = "auth_error"
    http_status = 401


class KeyMissing(AuthError):
    """No credential came with the request."""

    code = "missing_api_key"

    def __init__(self) -> None:
        super().__init__(
            "No API key was given; send it as 'Authorization: Bearer <key>'. An administrator"
            " makes one with `fabric-admin key add`."
        )


class KeyInvalid(AuthError):
    """The credential is not known or was revoked."""

    code = "invalid_api_key"

    def __init__(self) -> None:
        super().__init__(
            "The API key is not valid: it is unknown or was revoked. Check it with"
            " `fabric config show`, or ask an administrator for a new one."
        )


class KeyExpired(AuthError):
    """The credential's time is over."""

    code = "expired_api_key"

    def __init__(self, *, expired_at: str) -> None:
        super().__init__(
            f"The API key expired at {expired_at}; ask an administrator for a new one"
            " (`fabric-admin key add`).",
            expired_at=expired_at,
        )


class PermissionDenied(AuthError):
    """The caller is known but has no permission for this."""

    code = "permission_denied"
    http_status = 403

    def __init__(self, *, scope: str) -> None:
        super().__init__(
            f"This needs the permission {scope!r}, which the key does not have; ask an"
            " administrator for a key with it.",
            scope=scope,
        )


class NotFound(AuthError):
    """The object does not exist, or belongs to somebody else (deliberately the same answer)."""

    code = "not_found"
    http_status = 404

    def __init__(self, *, kind: str, name: str) -> None:
        super().__init__(
            f"There is no {kind} {name!r}; check the name, or list what there is.",
            kind=kind,
            name=name,
        )


# ---- Admission ----------------------------------------------------------------------------------


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
    """The caller has as many requests in flight as it may have."""

    code = "too_many_requests"
    http_status = 429
    retryable = True

    def __init__(self, *, limit: int, retry_after_s: float) -> None:
        super().__init__(
            f"There are already {limit} requests in flight for this key; wait for some to end, or"
            f" retry in {retry_after_s:g} s.",
            limit=limit,
            retry_after_s=retry_after_s,
        )


class Duplicate(AdmissionError):
    """An object of this name exists already."""

    code = "already_exists"
    http_status = 409

    def __init__(self, *, kind: str, name: str) -> None:
        super().__init__(
            f"There is already a {kind} {name!r}; choose another name, or modify that one.",
            kind=kind,
            name=name,
        )


# ---- Placement ----------------------------------------------------------------------------------


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


# ---- Dispatch -----------------------------------------------------------------------------------


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

    def __init__(self, *, instance: str, num_tokens: int, cause: str) -> None:
        super().__init__(
            f"The stream broke after {num_tokens} token(s) from {instance!r} ({cause}) and cannot"
            " be continued exactly, because it was sampled without a seed; send it again, with a"
            " seed if it should survive such a loss.",
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


# ---- Launch -------------------------------------------------------------------------------------


class LaunchError(FabricError):
    """An instance could not be started."""

    code = "launch_error"
    http_status = 503


class BlockFailed(LaunchError):
    """The block ended before or while its instance ran."""

    code = "block_failed"

    def __init__(self, *, site: str, reason: str, log_path: str = "") -> None:
        where = f" Its log is {log_path}." if log_path else ""
        super().__init__(
            f"The block at site {site!r} failed: {reason}.{where}",
            site=site,
            reason=reason,
            log_path=log_path,
        )


class CanaryFailed(LaunchError):
    """The instance loaded but did not generate its canary."""

    code = "canary_failed"

    def __init__(self, *, model: str, reason: str) -> None:
        super().__init__(
            f"The model {model!r} loaded but its canary failed: {reason}. The instance does not"
            " join the pool.",
            model=model,
            reason=reason,
        )


# ---- Engine -------------------------------------------------------------------------------------


class EngineError(FabricError):
    """The model engine could not do its part."""

    code = "engine_error"


class ModelNotLoadable(EngineError):
    """The model's files are missing or of a kind that cannot be served."""

    code = "model_not_loadable"

    def __init__(self, *, model: str, reason: str) -> None:
        super().__init__(
            f"The model {model!r} cannot be loaded: {reason}.", model=model, reason=reason
        )


class RowFailed(EngineError):
    """One request's row failed; others go on."""

    code = "row_failed"

    def __init__(self, *, reason: str) -> None:
        super().__init__(
            f"The engine ended this request alone: {reason}. Other requests are not affected.",
            reason=reason,
        )


class CacheExhausted(EngineError):
    """The request can never fit this instance's KV cache."""

    code = "cache_exhausted"
    http_status = 400

    def __init__(self, *, needed_tokens: int, cache_tokens: int) -> None:
        super().__init__(
            f"The request needs {needed_tokens} tokens of KV cache and the instance has"
            f" {cache_tokens}; ask for fewer tokens or choices.",
            needed_tokens=needed_tokens,
            cache_tokens=cache_tokens,
        )


class EngineStopped(EngineError):
    """The engine is draining or has ended and takes no new rows."""

    code = "engine_stopped"
    http_status = 503
    retryable = True

    def __init__(self, *, reason: str) -> None:
        super().__init__(
            f"The instance takes no new requests: {reason}. The request may be sent elsewhere.",
            reason=reason,
        )


# ---- Program, Payload, Version ------------------------------------------------------------------


class ProgramError(FabricError):
    """An intervention program is not valid or cannot be run here."""

    code = "program_error"
    http_status = 400


class PayloadError(FabricError):
    """A tensor or an object on the wire is not what it declares to be."""

    code = "payload_error"
    http_status = 400


class VersionError(FabricError):
    """A model version is missing, damaged or not what was asked for."""

    code = "version_error"
    http_status = 409


class DigestMismatch(VersionError):
    """Bytes do not have the digest they were asked by."""

    code = "digest_mismatch"

    def __init__(self, *, name: str, expected: str, actual: str) -> None:
        super().__init__(
            f"{name!r} has the digest {actual} where {expected} was expected; it is refused. Fetch"
            " it again, or register this version under a revision of its own.",
            name=name,
            expected=expected,
            actual=actual,
        )


# ---- Ledger -------------------------------------------------------------------------------------


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
