"""Who a batch acts for, hours after it was asked for."""

from __future__ import annotations

from fabric.auth import GLOBUS, Identity, Keys, Users, require
from fabric.auth.keys import DEFAULT_MAX_CONCURRENT
from fabric.batches.records import BatchRecord
from fabric.errors import KeyExpired, KeyInvalid, NotFound, UserBlocked
from fabric.sql import utc_now


def get_caller(keys: Keys, users: Users, batch: BatchRecord) -> Identity:
    """Return the caller of a batch, with half of its requests at once: the rest is for others.

    Of a Globus login only the project is checked, and that nobody keeps its owner out: nobody is
    there to log in again.

    Raises:
        KeyInvalid: The key was revoked or deleted, or the project was.
        KeyExpired: Its time is over.
        UserBlocked: The caller is kept out.
        PermissionDenied: It may not query any more.
    """
    try:
        keys.project(batch.project)
        if batch.key_id.startswith(GLOBUS):
            if (block := users.find_block([batch.key_id.removeprefix(GLOBUS)])) is not None:
                raise UserBlocked(user=block.user, reason=block.reason)
            scopes, max_concurrent = frozenset({"query"}), DEFAULT_MAX_CONCURRENT
        else:
            key = keys.key(batch.key_id)
            if key.revoked_at is not None:
                raise KeyInvalid
            if key.expires_at is not None and key.expires_at <= utc_now():
                raise KeyExpired(expired_at=key.expires_at.isoformat())
            scopes, max_concurrent = key.scopes, key.max_concurrent
    except NotFound:
        raise KeyInvalid from None
    caller = Identity(
        key_id=batch.key_id,
        project=batch.project,
        scopes=scopes,
        max_concurrent=max(1, max_concurrent // 2),
    )
    require(caller, "query")
    return caller
