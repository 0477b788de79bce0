"""The one taxonomy of errors.

Every error that crosses a room, a process or the wire is one of these::

    FabricError
    ├── ConfigError          SettingInvalid, PortInUse, AlreadyRunning, NotRunning
    ├── AuthError            KeyMissing, KeyInvalid, KeyExpired, PermissionDenied, NotFound
    ├── AdmissionError       RequestInvalid (UnknownParameter, UnsupportedParameter), BodyInvalid,
    │                        UnknownModel, UnknownSite, ContextExceeded, BodyTooLarge,
    │                        TooManyRequests, Duplicate
    ├── PlacementError       NoReplica, DeadlineExceeded
    ├── DispatchError        SessionLost, SessionRefused, FirstTokenTimeout, StreamBroken,
    │                        RequestCancelled, ProtocolViolation, HubUnreachable
    ├── LaunchError          BlockFailed, CanaryFailed
    ├── EngineError          ModelNotLoadable, RowFailed, CacheExhausted, EngineStopped
    ├── ProgramError
    ├── PayloadError
    ├── VersionError         DigestMismatch
    └── LedgerError          InsufficientBalance, UnknownAccount, AllocationClosed, HoldNotOpen,
                             ChargeExceedsHold, RateMissing, LedgerInconsistent, StorageFull,
                             StorageBusy

An error class carries ``code`` (stable, for programs), ``http_status`` and ``retryable`` (may the
same request succeed elsewhere or later?). Instances carry ``message`` (a full sentence: what, which
value, what to do) and ``detail`` (JSON-safe fields). Across processes goes ``Failure``
(``fabric.messages``), which is rebuilt here by code.
"""

from fabric.errors.admission import (
    AdmissionError,
    BodyInvalid,
    BodyTooLarge,
    ContextExceeded,
    Duplicate,
    RequestInvalid,
    TooManyRequests,
    UnknownModel,
    UnknownParameter,
    UnknownSite,
    UnsupportedParameter,
)
from fabric.errors.auth import (
    AuthError,
    KeyExpired,
    KeyInvalid,
    KeyMissing,
    NotFound,
    PermissionDenied,
)
from fabric.errors.base import (
    FabricError,
)
from fabric.errors.compute import (
    BlockFailed,
    CacheExhausted,
    CanaryFailed,
    EngineError,
    EngineStopped,
    LaunchError,
    ModelNotLoadable,
    RowFailed,
)
from fabric.errors.config import (
    AlreadyRunning,
    ConfigError,
    NotRunning,
    PortInUse,
    SettingInvalid,
)
from fabric.errors.data import (
    DigestMismatch,
    PayloadError,
    ProgramError,
    VersionError,
)
from fabric.errors.ledger import (
    AllocationClosed,
    ChargeExceedsHold,
    HoldNotOpen,
    InsufficientBalance,
    LedgerError,
    LedgerInconsistent,
    RateMissing,
    StorageBusy,
    StorageFull,
    UnknownAccount,
)
from fabric.errors.routing import (
    DeadlineExceeded,
    DispatchError,
    FirstTokenTimeout,
    HubUnreachable,
    NoReplica,
    PlacementError,
    ProtocolViolation,
    RequestCancelled,
    SessionLost,
    SessionRefused,
    StreamBroken,
)

__all__ = [
    "AdmissionError",
    "AllocationClosed",
    "AlreadyRunning",
    "AuthError",
    "BlockFailed",
    "BodyInvalid",
    "BodyTooLarge",
    "CacheExhausted",
    "CanaryFailed",
    "ChargeExceedsHold",
    "ConfigError",
    "ContextExceeded",
    "DeadlineExceeded",
    "DigestMismatch",
    "DispatchError",
    "Duplicate",
    "EngineError",
    "EngineStopped",
    "FabricError",
    "FirstTokenTimeout",
    "HoldNotOpen",
    "HubUnreachable",
    "InsufficientBalance",
    "KeyExpired",
    "KeyInvalid",
    "KeyMissing",
    "LaunchError",
    "LedgerError",
    "LedgerInconsistent",
    "ModelNotLoadable",
    "NoReplica",
    "NotFound",
    "NotRunning",
    "PayloadError",
    "PermissionDenied",
    "PlacementError",
    "PortInUse",
    "ProgramError",
    "ProtocolViolation",
    "RateMissing",
    "RequestCancelled",
    "RequestInvalid",
    "RowFailed",
    "SessionLost",
    "SessionRefused",
    "SettingInvalid",
    "StorageBusy",
    "StorageFull",
    "StreamBroken",
    "TooManyRequests",
    "UnknownAccount",
    "UnknownModel",
    "UnknownParameter",
    "UnknownSite",
    "UnsupportedParameter",
    "VersionError",
]
