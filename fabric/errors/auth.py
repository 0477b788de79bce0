"""Who calls, and what they may do."""

from __future__ import annotations

from fabric.errors.base import FabricError


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
            " makes one with `fabric-admin key add`. Where the hub takes Globus logins, log in with"
            " `fabric login`."
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
