"""The one taxonomy of errors.

Every error that crosses a room, a process or the wire is one of these::

    FabricError
    ├── ConfigError          SettingInvalid, PortInUse, AlreadyRunning, NotRunning,
    │                        PackageMissing, EndpointInvalid, SiteInvalid, FilesForeign
    ├── AuthError            KeyMissing, KeyInvalid, KeyExpired, PermissionDenied, NotFound,
    │                        TicketError (TicketMissing, TicketInvalid, TicketExpired,
    │                        TicketForeign, TicketSpent), CredentialsRefused,
    │                        TokenExpired, TokenInvalid, NotAMember, ProjectNotChosen,
    │                        ProjectForeign, AuthUnavailable, LoginRequired, LoginFailed
    ├── AdmissionError       RequestInvalid (UnknownParameter, UnsupportedParameter,
    │                        ConstraintInvalid), BodyInvalid,
    │                        UnknownModel, UnknownSite, ContextExceeded, BodyTooLarge,
    │                        TooManyRequests, Duplicate, FilesFull, FileInUse, BatchOver,
    │                        ArtifactsFull,
    │                        PlanError (UnknownDevice, UnknownShape, ShapeInvalid, PlanImpossible)
    ├── PlacementError       NoReplica, DeadlineExceeded
    ├── DispatchError        SessionLost, SessionRefused, FirstTokenTimeout, StreamBroken,
    │                        RequestCancelled, ProtocolViolation, HubUnreachable,
    │                        HubNotConnected, ServiceUnreachable, ServiceBusy, ServiceRefused,
    │                        TaskLost, TaskTimedOut, TaskFailed
    ├── LaunchError          BlockFailed, CanaryFailed, AlreadyStarted, SchedulerFailed,
    │                        BalanceUnavailable
    ├── EngineError          ModelNotLoadable, RowFailed, ConstraintFailed, CacheExhausted,
    │                        EngineStopped
    ├── ProgramError         ProgramInvalid, PointUnknown, PointRefused, ProgramTooLarge,
    │                        ProgramFailed, TraceError
    ├── PayloadError         PayloadInvalid, PayloadTooLarge, PayloadMissing, PayloadDamaged,
    │                        UnknownStore, StoreUnreachable
    ├── VersionError         DigestMismatch, FunctionDrifted, ManifestInvalid, ReplicationFailed,
    │                        DiskTooSmall
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
    ConstraintInvalid,
    ContextExceeded,
    Duplicate,
    RequestInvalid,
    TooManyRequests,
    UnknownModel,
    UnknownParameter,
    UnknownSite,
    UnsupportedParameter,
)
from fabric.errors.artifacts import (
    ArtifactsFull,
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
from fabric.errors.batches import (
    BatchOver,
    FileInUse,
    FilesFull,
)
from fabric.errors.compute import (
    AlreadyStarted,
    BalanceUnavailable,
    BlockFailed,
    CacheExhausted,
    CanaryFailed,
    ConstraintFailed,
    EngineError,
    EngineStopped,
    LaunchError,
    ModelNotLoadable,
    RowFailed,
    SchedulerFailed,
)
from fabric.errors.config import (
    AlreadyRunning,
    ConfigError,
    EndpointInvalid,
    FilesForeign,
    NotRunning,
    PackageMissing,
    PortInUse,
    SettingInvalid,
    SiteInvalid,
)
from fabric.errors.data import (
    DigestMismatch,
    DiskTooSmall,
    FunctionDrifted,
    ManifestInvalid,
    ReplicationFailed,
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
from fabric.errors.login import (
    AuthUnavailable,
    LoginFailed,
    LoginRequired,
    NotAMember,
    ProjectForeign,
    ProjectNotChosen,
    TokenExpired,
    TokenInvalid,
)
from fabric.errors.payload import (
    PayloadDamaged,
    PayloadError,
    PayloadInvalid,
    PayloadMissing,
    PayloadTooLarge,
    StoreUnreachable,
    UnknownStore,
)
from fabric.errors.planning import (
    PlanError,
    PlanImpossible,
    ShapeInvalid,
    UnknownDevice,
    UnknownShape,
)
from fabric.errors.programs import (
    PointRefused,
    PointUnknown,
    ProgramError,
    ProgramFailed,
    ProgramInvalid,
    ProgramTooLarge,
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
from fabric.errors.service import (
    CredentialsRefused,
    ServiceBusy,
    ServiceRefused,
    ServiceUnreachable,
    TaskFailed,
    TaskLost,
    TaskTimedOut,
)
from fabric.errors.tickets import (
    HubNotConnected,
    TicketError,
    TicketExpired,
    TicketForeign,
    TicketInvalid,
    TicketMissing,
    TicketSpent,
)
from fabric.errors.tracing import (
    TraceError,
)

__all__ = [
    "AdmissionError",
    "AllocationClosed",
    "AlreadyRunning",
    "AlreadyStarted",
    "ArtifactsFull",
    "AuthError",
    "AuthUnavailable",
    "BalanceUnavailable",
    "BatchOver",
    "BlockFailed",
    "BodyInvalid",
    "BodyTooLarge",
    "CacheExhausted",
    "CanaryFailed",
    "ChargeExceedsHold",
    "ConfigError",
    "ConstraintFailed",
    "ConstraintInvalid",
    "ContextExceeded",
    "CredentialsRefused",
    "DeadlineExceeded",
    "DigestMismatch",
    "DiskTooSmall",
    "DispatchError",
    "Duplicate",
    "EndpointInvalid",
    "EngineError",
    "EngineStopped",
    "FabricError",
    "FileInUse",
    "FilesForeign",
    "FilesFull",
    "FirstTokenTimeout",
    "FunctionDrifted",
    "HoldNotOpen",
    "HubNotConnected",
    "HubUnreachable",
    "InsufficientBalance",
    "KeyExpired",
    "KeyInvalid",
    "KeyMissing",
    "LaunchError",
    "LedgerError",
    "LedgerInconsistent",
    "LoginFailed",
    "LoginRequired",
    "ManifestInvalid",
    "ModelNotLoadable",
    "NoReplica",
    "NotAMember",
    "NotFound",
    "NotRunning",
    "PackageMissing",
    "PayloadDamaged",
    "PayloadError",
    "PayloadInvalid",
    "PayloadMissing",
    "PayloadTooLarge",
    "PermissionDenied",
    "PlacementError",
    "PlanError",
    "PlanImpossible",
    "PointRefused",
    "PointUnknown",
    "PortInUse",
    "ProgramError",
    "ProgramFailed",
    "ProgramInvalid",
    "ProgramTooLarge",
    "ProjectForeign",
    "ProjectNotChosen",
    "ProtocolViolation",
    "RateMissing",
    "ReplicationFailed",
    "RequestCancelled",
    "RequestInvalid",
    "RowFailed",
    "SchedulerFailed",
    "ServiceBusy",
    "ServiceRefused",
    "ServiceUnreachable",
    "SessionLost",
    "SessionRefused",
    "SettingInvalid",
    "ShapeInvalid",
    "SiteInvalid",
    "StorageBusy",
    "StorageFull",
    "StoreUnreachable",
    "StreamBroken",
    "TaskFailed",
    "TaskLost",
    "TaskTimedOut",
    "TicketError",
    "TicketExpired",
    "TicketForeign",
    "TicketInvalid",
    "TicketMissing",
    "TicketSpent",
    "TokenExpired",
    "TokenInvalid",
    "TooManyRequests",
    "TraceError",
    "UnknownAccount",
    "UnknownDevice",
    "UnknownModel",
    "UnknownParameter",
    "UnknownShape",
    "UnknownSite",
    "UnknownStore",
    "UnsupportedParameter",
    "VersionError",
]
