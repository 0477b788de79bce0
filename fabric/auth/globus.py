"""Globus logins: tokens that Globus Auth vouches for, and the projects of their owners' groups."""

from __future__ import annotations

import hashlib
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NoReturn

from fabric.auth.groups import Groups
from fabric.auth.identity import Identity
from fabric.auth.records import BlockedUser, Membership, add_up
from fabric.auth.users import Users
from fabric.errors import (
    AuthError,
    AuthUnavailable,
    NotAMember,
    ProjectNotChosen,
    TokenExpired,
    TokenInvalid,
    UserBlocked,
)
from fabric.sql import utc_now

if TYPE_CHECKING:
    from globus_sdk import ConfidentialAppAuthClient, GlobusAPIError

logger = logging.getLogger(__name__)

CACHE_S = 60.0
"""How long Globus Auth's word counts: the longest a revoked token, or a left group, goes on."""

SKEW_S = 60.0
"""How far the hub's clock and Globus Auth's may be apart."""

RETRY_AFTER_S = 5.0
TIMEOUT_S = 5.0
MAX_NAMED_GROUPS = 10

GROUPS_SCOPE = "urn:globus:auth:scope:groups.api.globus.org:view_my_groups_and_memberships"
"""What the hub's own scope must depend on, at its registration with Globus Auth."""

GROUPS_SERVER = "groups.api.globus.org"

_NO_CONSENT = "its owner has not agreed that the hub may see group memberships"
_CACHE_ENTRIES = 4096
_TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]{20,4096}")


@dataclass(slots=True)
class _Known:
    """What Globus said of a token, and the hub's database of its owner.

    ``names`` are the UUIDs and usernames of those identities of the owner that Globus told.
    ``group_names`` is filled when a refusal needs it.
    """

    subject: str
    user: str
    expires_at: datetime
    groups: frozenset[str]
    names: frozenset[str]
    asked_at_s: float
    num_changes: int = -1
    granted: Mapping[str, Membership] = field(default_factory=dict)
    block: BlockedUser | None = None
    group_names: dict[str, str] = field(default_factory=dict)


class GlobusTokens:
    """The callers of one hub that are logged in with Globus. Thread-safe.

    A token is introspected with the hub's own credentials, and must be for the hub and carry its
    scope. The caller's groups are read with a token that depends on it, and say for which projects
    the caller may act; so does what ``users`` has of the caller. One who is kept out there is so by
    each identity that brings a group. Answers are kept for ``CACHE_S`` by the token's SHA-256.

    Args:
        groups: Which groups belong to which projects.
        users: Who acts for a project without a group, and who is kept out.
        client_id: The hub's, at Globus Auth.
        client_secret: Its secret.
        scope: The scope that a caller's token must have.
        clock: The wall clock, for expiry.
        monotonic: Seconds that only grow, for the cache.
    """

    def __init__(
        self,
        groups: Groups,
        users: Users,
        *,
        client_id: str,
        client_secret: str,
        scope: str,
        clock: Callable[[], datetime] = utc_now,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._groups = groups
        self._users = users
        self._client_id = client_id
        self._client_secret = client_secret
        self._scope = scope
        self._clock = clock
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._known: dict[str, _Known] = {}
        self._num_changes = 0
        self._down_until_s = float("-inf")
        self._thread = threading.local()
        self._opened = ExitStack()

    def close(self) -> None:
        """Close the connections to Globus Auth. Calling it twice is harmless."""
        self._opened.close()

    def recheck(self) -> None:
        """Read anew what the database has of callers and their groups: it may have changed."""
        self._num_changes += 1

    def recall(self, bearer: str, project: str | None = None) -> Identity | None:
        """Return whose token this is if that is known and needs no question, else ``None``.

        For callers on an event loop: what it does not know, ``authenticate`` finds out.
        """
        known = self._recall(_sha256(bearer))
        if known is None or known.block or known.num_changes != self._num_changes:
            return None
        granted = _choose(known, project)
        return None if granted is None else _identity(known, granted)

    def authenticate(self, bearer: str, project: str | None = None) -> Identity:
        """Return whose token this is, acting for a project. Asks Globus, so it may take seconds.

        Args:
            bearer: The token, as it follows ``Bearer`` in the header.
            project: For whom the caller acts; may be left out by members of one.

        Raises:
            TokenExpired: Globus Auth does not vouch for the token.
            TokenInvalid: The token is not for this hub, or has not its scope.
            UserBlocked: The caller is kept out.
            NotAMember: The caller is in no group of the project, or of any.
            ProjectNotChosen: The caller is in groups of several, and chose none.
            AuthUnavailable: Globus cannot be asked.
        """
        if not _TOKEN.fullmatch(bearer):
            raise TokenInvalid(reason="it is neither an API key nor a Globus token")
        digest = _sha256(bearer)
        known = self._recall(digest)
        if known is None:
            known = self._ask(bearer)
            with self._lock:
                if len(self._known) >= _CACHE_ENTRIES:
                    self._known.clear()
                self._known[digest] = known
        elif known.num_changes != self._num_changes:
            self._look_up(known)
        if known.block is not None:
            raise UserBlocked(user=known.user, reason=known.block.reason)
        if (granted := _choose(known, project)) is not None:
            return _identity(known, granted)
        if project is None and known.granted:
            raise ProjectNotChosen(
                user=known.user,
                projects=sorted(known.granted),
                expires_at=known.expires_at.isoformat(),
            )
        raise NotAMember(
            user=known.user, project=project, groups=self._eligible(bearer, known, project)
        )

    def _recall(self, digest: str) -> _Known | None:
        with self._lock:
            known = self._known.get(digest)
            if known is None:
                return None
            fresh = self._monotonic() - known.asked_at_s < CACHE_S
            if not fresh or known.expires_at <= self._clock():
                del self._known[digest]
                return None
            return known

    def _ask(self, bearer: str) -> _Known:
        asked_at_s = self._monotonic()
        with self._answering():
            claims = self._auth_client().oauth2_token_introspect(bearer).data
        expires_at = self._check(claims)
        user = str(claims.get("username") or claims["sub"])
        subject = str(claims["sub"])
        groups, names = self._member_of(bearer)
        known = _Known(
            subject=subject,
            user=user,
            expires_at=expires_at,
            groups=groups,
            names=names | {subject, user.lower()},
            asked_at_s=asked_at_s,
        )
        self._users.note_login(subject, user.lower())
        self._look_up(known)
        return known

    def _look_up(self, known: _Known) -> None:
        """Read what the database has of a caller."""
        num_changes = self._num_changes
        known.block = self._users.find_block(known.names)
        known.granted = add_up(
            [*self._groups.records_of(known.groups), *self._users.records_of(known.names)]
        )
        # Last: until then others do not take it for news.
        known.num_changes = num_changes

    def _check(self, claims: Mapping[str, Any]) -> datetime:
        """Return when a token ends that is good for this hub."""
        if claims.get("active") is not True:
            raise TokenExpired
        # A token that Globus issued to the hub itself names it in its audience too; only one for
        # the hub has the hub's scope.
        if self._client_id not in claims.get("aud", ()):
            raise TokenInvalid(reason="it was issued for another service")
        if self._scope not in str(claims.get("scope", "")).split():
            raise TokenInvalid(reason=f"it has not the scope {self._scope}")
        skew, now = timedelta(seconds=SKEW_S), self._clock()
        expires_at = datetime.fromtimestamp(claims["exp"], UTC)
        if expires_at + skew <= now:
            raise TokenExpired
        if datetime.fromtimestamp(claims.get("nbf", 0), UTC) - skew > now:
            raise TokenInvalid(reason="it is not valid yet, by the hub's clock")
        return expires_at

    def _member_of(self, bearer: str) -> tuple[frozenset[str], frozenset[str]]:
        """Return the ids of the groups in which the caller is an active member, and the UUIDs and
        usernames of the identities that are: they may be linked ones."""
        with self._groups_client(bearer) as client:
            mine = client.get_my_groups(statuses="active").data
        active = [
            (str(group["id"]), one)
            for group in mine
            for one in group["my_memberships"]
            if one["status"] == "active"
        ]
        names = (one.get(name) for _, one in active for name in ("identity_id", "username"))
        return (
            frozenset(group for group, _ in active),
            frozenset(str(name).lower() for name in names if name),
        )

    def _eligible(self, bearer: str, known: _Known, project: str | None) -> list[str]:
        """Return the groups that would do: by name if Globus shows them to the caller, else by id.

        Asked only when somebody is refused, and then once for each group and answer of Globus.
        """
        ids = [one.group_id for one in self._groups.groups(project)]
        ids = list(dict.fromkeys(ids))[:MAX_NAMED_GROUPS]
        if unknown := [one for one in ids if one not in known.group_names]:
            # What the caller is told must not depend on whether Globus answers just now.
            with suppress(AuthError), self._groups_client(bearer) as client:
                known.group_names |= {one: _name_of(client, one) for one in unknown}
        return [known.group_names.get(one, one) for one in ids]

    @contextmanager
    def _groups_client(self, bearer: str) -> Iterator[Any]:
        """Give a client that asks Globus Groups on the caller's behalf."""
        from globus_sdk import AccessTokenAuthorizer, GroupsClient

        with self._answering():
            tokens = self._auth_client().oauth2_get_dependent_tokens(bearer, scope=GROUPS_SCOPE)
            granted = tokens.by_resource_server.get(GROUPS_SERVER)
            if granted is None:
                raise TokenInvalid(reason=_NO_CONSENT)
            token = granted["access_token"]
            with GroupsClient(authorizer=AccessTokenAuthorizer(token), **_get_patience()) as client:
                yield client

    def _auth_client(self) -> ConfidentialAppAuthClient:
        """Return this thread's client: its connection is kept open between questions."""
        from globus_sdk import ConfidentialAppAuthClient

        client: ConfidentialAppAuthClient | None = getattr(self._thread, "client", None)
        if client is None:
            client = ConfidentialAppAuthClient(
                self._client_id, self._client_secret, **_get_patience()
            )
            self._thread.client = client
            with self._lock:
                self._opened.callback(client.transport.close)
        return client

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """Make Globus' errors ours, and ask nothing for a while after there was no answer."""
        from globus_sdk import GlobusAPIError, NetworkError

        wait_s = self._down_until_s - self._monotonic()
        if wait_s > 0:
            raise AuthUnavailable(reason="it did not answer just now", retry_after_s=wait_s)
        try:
            yield
        except GlobusAPIError as error:
            self._refuse(error)
        except NetworkError as error:
            self._down(type(error.underlying_exception).__name__, error)

    def _refuse(self, error: GlobusAPIError) -> NoReturn:
        status = error.http_status
        if status == 429 or status >= 500:
            self._down(f"it answered {status}", error)
        if status == 401 and error.raw_json and error.raw_json.get("error") == "invalid_client":
            logger.error("Globus Auth does not accept the hub's own client id and secret.")
            self._down("the hub's own credentials are not accepted", error)
        if status == 403:
            raise TokenInvalid(reason=_NO_CONSENT) from error
        # The token ended between two questions.
        raise TokenExpired from error

    def _down(self, reason: str, error: Exception) -> NoReturn:
        self._down_until_s = self._monotonic() + RETRY_AFTER_S
        raise AuthUnavailable(reason=reason, retry_after_s=RETRY_AFTER_S) from error


def _choose(known: _Known, project: str | None) -> Membership | None:
    """Return what the caller may do in the project asked for, or in the only one."""
    if project is None and len(known.granted) == 1:
        return next(iter(known.granted.values()))
    return known.granted.get(project) if project is not None else None


def _identity(known: _Known, granted: Membership) -> Identity:
    return Identity(
        key_id=f"globus:{known.subject}",
        project=granted.project,
        scopes=granted.scopes,
        max_concurrent=granted.max_concurrent,
        user=known.user,
        projects=tuple(sorted(known.granted)),
        expires_at=known.expires_at,
        groups=known.groups,
    )


def _name_of(client: Any, group_id: str) -> str:
    from globus_sdk import GroupsAPIError

    try:
        return str(client.get_group(group_id)["name"])
    except GroupsAPIError as error:
        if error.http_status in (403, 404):
            return group_id
        raise


def _get_patience() -> dict[str, Any]:
    """Return how long, and how often, one question to Globus is tried."""
    from globus_sdk.transport import RequestsTransport, RetryConfig

    return {
        "transport": RequestsTransport(http_timeout=TIMEOUT_S),
        "retry_config": RetryConfig(max_retries=1, max_sleep=1),
    }


def _sha256(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
