"""Tickets: short-lived proof of who pays for raw calls at one site.

A raw call goes to a site without passing the hub, and a key never goes to a site: what goes there
is a ticket, good for one project, one site and at most a day. No route takes it for a key.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta

from sqlalchemy import Connection, RowMapping, bindparam, insert, select, update

from fabric.auth.identity import PROGRAM_SCOPES, Identity
from fabric.auth.records import TicketRecord
from fabric.auth.tables import api_keys, tickets
from fabric.errors import NotFound, RequestInvalid, TicketExpired, TicketInvalid, TicketMissing
from fabric.sql import Database, utc_now

DEFAULT_LIFETIME_S = 3600.0
MAX_LIFETIME_S = 86_400.0
MAX_USU = 10**15

_TICKET = re.compile(r"fabt_([0-9a-f]{12})_[0-9A-Za-z_-]{43}")
_FIELDS = [column for column in tickets.c if column is not tickets.c.secret_sha256]
_KEY_END = select(api_keys.c.expires_at).where(api_keys.c.id == bindparam("key"))
_BY_ID = select(tickets).where(tickets.c.id == bindparam("ticket"))


class Tickets:
    """The tickets of all projects over one database. Thread-safe.

    A ticket reads ``fabt_<id>_<secret>``; the id names it in lists and logs, and the
    database holds a SHA-256 of the whole. Nothing is cached: a revoked ticket is void at once.

    Args:
        database: An open, migrated database.
        clock: The wall clock, for expiry.
    """

    def __init__(self, database: Database, *, clock: Callable[[], datetime] = utc_now) -> None:
        self._database = database
        self._clock = clock

    def add(
        self,
        issuer: Identity,
        site: str,
        *,
        lifetime_s: float = DEFAULT_LIFETIME_S,
        max_usu: int | None = None,
    ) -> tuple[TicketRecord, str]:
        """Create a ticket; return its record and the ticket itself, shown only here.

        Args:
            issuer: Whose project pays, and whose limit of requests in flight the calls count for.
            site: Where it is taken.
            lifetime_s: Seconds it is good for: at most a day, and no longer than the issuer's key.
            max_usu: The most that all its calls together may cost, in micro-SU.

        Raises:
            RequestInvalid: The lifetime or the amount is out of range.
        """
        if not 0.0 < lifetime_s <= MAX_LIFETIME_S:
            reason = f"a ticket lives for up to {MAX_LIFETIME_S:g} s"
            raise RequestInvalid(param="ttl_s", value=lifetime_s, reason=reason)
        if max_usu is not None and not 0 < max_usu <= MAX_USU:
            reason = f"it is between 1 and {MAX_USU} micro-SU"
            raise RequestInvalid(param="max_usu", value=max_usu, reason=reason)
        ticket_id, now = secrets.token_hex(6), self._clock()
        ticket = f"fabt_{ticket_id}_{secrets.token_urlsafe(32)}"
        record = TicketRecord(
            id=ticket_id,
            project=issuer.project,
            issued_by=issuer.key_id,
            site=site,
            max_usu=max_usu,
            max_concurrent=issuer.max_concurrent,
            scopes=issuer.scopes & PROGRAM_SCOPES,
            created_at=now,
            expires_at=now + timedelta(seconds=lifetime_s),
            revoked_at=None,
        )
        with self._database.transaction() as connection:
            key_ends_at = connection.execute(_KEY_END, {"key": issuer.key_id}).scalar()
            if key_ends_at is not None:
                record = replace(record, expires_at=min(record.expires_at, key_ends_at))
            row = {column.name: getattr(record, column.name) for column in _FIELDS}
            row |= {"scopes": " ".join(sorted(record.scopes)), "secret_sha256": _sha256(ticket)}
            connection.execute(insert(tickets), row)
        return record, ticket

    def listed(self, project: str) -> list[TicketRecord]:
        """Return the tickets of a project that can still be used, oldest first."""
        query = (
            select(*_FIELDS)
            .where(
                tickets.c.project == project,
                tickets.c.revoked_at.is_(None),
                tickets.c.expires_at > self._clock(),
            )
            .order_by(tickets.c.created_at, tickets.c.id)
        )
        with self._database.read() as connection:
            return [_to_record(row._mapping) for row in connection.execute(query)]

    def revoke(self, ticket_id: str, *, project: str) -> TicketRecord:
        """Void a ticket for good; calls it has paid for go on.

        Raises:
            NotFound: The project has none of this id.
        """
        with self._database.transaction() as connection:
            connection.execute(
                update(tickets)
                .where(
                    tickets.c.id == ticket_id,
                    tickets.c.project == project,
                    tickets.c.revoked_at.is_(None),
                )
                .values(revoked_at=self._clock())
            )
            row = connection.execute(_BY_ID, {"ticket": ticket_id}).first()
            if row is None or row.project != project:
                raise NotFound(kind="ticket", name=ticket_id)
            return _to_record(row._mapping)

    def authenticate(self, ticket: str | None) -> TicketRecord:
        """Return the record of a ticket that is good now.

        Raises:
            TicketMissing: There is none.
            TicketInvalid: It is not a ticket, unknown or revoked.
            TicketExpired: Its time is over.
        """
        if not ticket:
            raise TicketMissing
        if (match := _TICKET.fullmatch(ticket)) is None:
            raise TicketInvalid
        with self._database.read() as connection:
            row = connection.execute(_BY_ID, {"ticket": match[1]}).first()
        stored = row.secret_sha256 if row is not None else ""
        if not hmac.compare_digest(stored, _sha256(ticket)) or row is None or row.revoked_at:
            raise TicketInvalid
        if row.expires_at <= self._clock():
            raise TicketExpired(expired_at=row.expires_at.isoformat())
        return _to_record(row._mapping)


def revoke_issued(connection: Connection, key_id: str, now: datetime) -> None:
    """Void all tickets that were issued to a key, as part of the key's own revocation."""
    connection.execute(
        update(tickets)
        .where(tickets.c.issued_by == key_id, tickets.c.revoked_at.is_(None))
        .values(revoked_at=now)
    )


def _sha256(ticket: str) -> str:
    return hashlib.sha256(ticket.encode()).hexdigest()


def _to_record(row: RowMapping) -> TicketRecord:
    fields = {column.name: row[column.name] for column in _FIELDS}
    return TicketRecord(**fields | {"scopes": frozenset(str(row["scopes"] or "").split())})
