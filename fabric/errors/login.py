"""Globus logins: why a token is not taken, and what its owner may do about it."""

from __future__ import annotations

from collections.abc import Sequence

from fabric.errors.auth import AuthError


class TokenExpired(AuthError):
    """Globus Auth does not vouch for the token, and says no more than that."""

    code = "token_expired"

    def __init__(self) -> None:
        super().__init__(
            "Globus Auth does not accept the token: it has expired, was revoked, or is for another"
            " service. Log in again with `fabric login`."
        )


class TokenInvalid(AuthError):
    """The token is good, but not for this hub."""

    code = "invalid_token"

    def __init__(self, *, reason: str) -> None:
        super().__init__(
            f"The token cannot be used here: {reason}. Log in again with `fabric login`.",
            reason=reason,
        )


class NotAMember(AuthError):
    """The caller is known to Globus, but in no group of the project, or of any."""

    code = "not_a_member"
    http_status = 403

    def __init__(self, *, user: str, project: str | None, groups: Sequence[str]) -> None:
        where = f"the project {project!r}" if project else "any project of this hub"
        remedy = f"a manager of one of these can add you: {', '.join(groups)}"
        super().__init__(
            f"The Globus user {user!r} is in no group of {where};"
            f" {remedy if groups else 'ask an administrator of the hub'}.",
            user=user,
            project=project,
            groups=list(groups),
        )


class UserBlocked(AuthError):
    """The caller is known to Globus, and an administrator keeps them out of this hub."""

    code = "user_blocked"
    http_status = 403

    def __init__(self, *, user: str, reason: str) -> None:
        why = f": {reason}" if reason else ""
        super().__init__(
            f"The Globus user {user!r} is kept out of this hub{why};"
            " ask an administrator of the hub.",
            user=user,
            reason=reason,
        )


class ProjectNotChosen(AuthError):
    """The caller may act for several projects and did not say for which."""

    code = "project_not_chosen"
    http_status = 400

    def __init__(self, *, user: str, projects: Sequence[str], expires_at: str) -> None:
        super().__init__(
            f"You may act for the projects {', '.join(projects)}; choose one with the setting"
            " client.project (FABRIC_PROJECT), or the header Fabric-Project.",
            user=user,
            projects=list(projects),
            expires_at=expires_at,
        )


class ProjectForeign(AuthError):
    """An API key was sent together with the name of another project than its own."""

    code = "foreign_project"
    http_status = 403

    def __init__(self, *, project: str) -> None:
        super().__init__(
            f"The API key does not belong to the project {project!r}; leave the setting"
            " client.project (FABRIC_PROJECT, the header Fabric-Project) out, or use a key of it.",
            project=project,
        )


class AuthUnavailable(AuthError):
    """Globus cannot be asked who the caller is."""

    code = "auth_unavailable"
    http_status = 503
    retryable = True

    def __init__(self, *, reason: str, retry_after_s: float) -> None:
        super().__init__(
            f"Globus cannot be asked whose token this is: {reason}. Try again in"
            f" {retry_after_s:g} s; API keys work all the same.",
            reason=reason,
            retry_after_s=retry_after_s,
        )


class LoginRequired(AuthError):
    """Nobody is logged in to this hub, or the login is over."""

    code = "login_required"

    def __init__(self, *, url: str, reason: str = "nobody is logged in") -> None:
        super().__init__(
            f"There is no login for the hub {url}: {reason}. Log in with `fabric login`, or set"
            " FABRIC_API_KEY.",
            url=url,
            reason=reason,
        )


class LoginFailed(AuthError):
    """Globus Auth did not complete the login."""

    code = "login_failed"

    def __init__(self, *, reason: str) -> None:
        super().__init__(
            f"Globus Auth did not complete the login: {reason}. Run `fabric login` again.",
            reason=reason,
        )
