"""Tickets: made once, good for a while at one site, and for nothing else."""

import logging
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fabric.auth import Identity, Keys, TicketRecord
from fabric.errors import (
    KeyInvalid,
    NotFound,
    RequestInvalid,
    TicketExpired,
    TicketInvalid,
    TicketMissing,
)
from fabric.sql import Database


class Clock:
    now = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def keys(database: Database, clock: Clock) -> Keys:
    keys = Keys(database, clock=clock)
    keys.add_project("astro")
    keys.add_project("bio")
    return keys


@pytest.fixture
def issuer(keys: Keys) -> Identity:
    return keys.authenticate(keys.add_key("astro", max_concurrent=3)[1])


def add(keys: Keys, issuer: Identity, **options: object) -> tuple[TicketRecord, str]:
    return keys.tickets.add(issuer, "alpha", **options)


def test_ticket_stands_for_its_issuers_project_at_one_site(keys: Keys, issuer: Identity) -> None:
    record, ticket = add(keys, issuer, max_usu=7)
    assert keys.tickets.authenticate(ticket) == record
    assert (record.site, record.max_usu) == ("alpha", 7)
    assert record.identity() == Identity(
        key_id=issuer.key_id,
        project="astro",
        scopes=frozenset({"ticket"}),
        max_concurrent=3,
        site="alpha",
    )


def test_ticket_is_no_key_and_a_key_no_ticket(keys: Keys, issuer: Identity) -> None:
    with pytest.raises(KeyInvalid):
        keys.authenticate(add(keys, issuer)[1])
    with pytest.raises(TicketInvalid, match="not a ticket"):
        keys.tickets.authenticate(keys.add_key("astro")[1])
    with pytest.raises(RequestInvalid, match="scopes"):
        keys.add_key("astro", scopes=("ticket",))


def test_secret_is_neither_stored_nor_logged(
    keys: Keys,
    issuer: Identity,
    database: Database,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    record, ticket = add(keys, issuer)
    keys.tickets.authenticate(ticket)
    secret = ticket.removeprefix(f"fabt_{record.id}_")
    assert len(secret) == 43
    assert secret not in repr(record) + repr(keys.tickets.listed("astro")) + caplog.text
    database.close()
    assert not any(secret.encode() in path.read_bytes() for path in tmp_path.glob("fabric.db*"))


@pytest.mark.parametrize("change", ["secret", "id", "empty", "garbage", "unicode"])
def test_other_strings_are_refused(keys: Keys, issuer: Identity, change: str) -> None:
    ticket = add(keys, issuer)[1]
    wrong = {
        "secret": ticket[:-1] + ("a" if ticket[-1] != "a" else "b"),
        "id": "fabt_" + "0" * 12 + ticket[17:],
        "empty": "",
        "garbage": "fabt_",
        "unicode": "fabt_é",
    }
    with pytest.raises(TicketMissing if change == "empty" else TicketInvalid):
        keys.tickets.authenticate(wrong[change])


def test_ticket_ends_after_an_hour_by_default(keys: Keys, issuer: Identity, clock: Clock) -> None:
    record, ticket = add(keys, issuer)
    clock.now = record.created_at + timedelta(seconds=3599)
    assert keys.tickets.authenticate(ticket) == record
    clock.now += timedelta(seconds=1)
    with pytest.raises(TicketExpired, match="2026-01-01T01:00"):
        keys.tickets.authenticate(ticket)
    assert keys.tickets.listed("astro") == []


def test_ticket_ends_with_its_issuers_key(keys: Keys, clock: Clock) -> None:
    ends_at = clock.now + timedelta(minutes=10)
    short = keys.authenticate(keys.add_key("astro", expires_at=ends_at)[1])
    assert add(keys, short)[0].expires_at == ends_at
    assert add(keys, short, lifetime_s=60.0)[0].expires_at < ends_at


@pytest.mark.parametrize("lifetime_s", [0.0, -1.0, 86_401.0, float("nan"), float("inf")])
def test_lifetime_is_at_most_a_day(keys: Keys, issuer: Identity, lifetime_s: float) -> None:
    with pytest.raises(RequestInvalid, match="86400"):
        add(keys, issuer, lifetime_s=lifetime_s)


@pytest.mark.parametrize("max_usu", [0, -1, 10**15 + 1])
def test_cap_is_an_amount(keys: Keys, issuer: Identity, max_usu: int) -> None:
    with pytest.raises(RequestInvalid, match="max_usu"):
        add(keys, issuer, max_usu=max_usu)


def test_revoked_ticket_is_void_at_once(keys: Keys, issuer: Identity) -> None:
    record, ticket = add(keys, issuer)
    keys.tickets.authenticate(ticket)
    revoked = keys.tickets.revoke(record.id, project="astro")
    assert keys.tickets.revoke(record.id, project="astro") == revoked
    assert revoked.revoked_at is not None
    with pytest.raises(TicketInvalid, match="revoked"):
        keys.tickets.authenticate(ticket)


def test_tickets_of_others_are_not_there(keys: Keys, issuer: Identity) -> None:
    record, ticket = add(keys, issuer)
    assert keys.tickets.listed("bio") == []
    with pytest.raises(NotFound):
        keys.tickets.revoke(record.id, project="bio")
    assert keys.tickets.authenticate(ticket) == record


def test_revoking_a_key_voids_its_tickets_alone(keys: Keys, issuer: Identity) -> None:
    _, ticket = add(keys, issuer)
    other = keys.authenticate(keys.add_key("astro")[1])
    kept, kept_ticket = add(keys, other)
    keys.revoke(issuer.key_id)
    with pytest.raises(TicketInvalid):
        keys.tickets.authenticate(ticket)
    assert keys.tickets.authenticate(kept_ticket) == kept
    keys.delete_project("astro")
    with pytest.raises(TicketInvalid):
        keys.tickets.authenticate(kept_ticket)
