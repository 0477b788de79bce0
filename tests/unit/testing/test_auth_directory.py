"""The stand-in's memory: tokens end when their time is over, and outlive a restart."""

from __future__ import annotations

from pathlib import Path

from fabric.testing.clock import Clock
from fabric.testing.globus.auth import GROUPS_SCOPE, AuthDirectory


def test_tokens_end_when_their_time_is_over() -> None:
    clock = Clock()
    directory = AuthDirectory(token_lifetime_s=10, clock=clock.monotonic)
    alice, app = directory.add_user("alice@example.edu"), directory.add_native_client("fabric")
    token = directory.issue("access", alice.id, app.id, "openid").value
    refresh = directory.issue("refresh", alice.id, app.id, "openid").value
    clock.advance(9)
    assert directory.identity_of(token) == alice
    clock.advance(1)
    assert directory.identity_of(token) is None
    assert directory.identity_of(refresh) is None
    assert directory.grant(refresh, "refresh") is not None


def test_restarted_service_knows_what_it_knew(tmp_path: Path) -> None:
    path = tmp_path / "accounts.json"
    before = AuthDirectory(path=path)
    hub = before.add_client("hub", client_id="5f1c6e0e-0000-4000-8000-000000000000", secret="s")
    scope = before.add_scope(hub, dependencies=[GROUPS_SCOPE])
    other = before.add_user("alice@lab.example")
    alice = before.add_user("alice@example.edu", linked=[other.id])
    group = before.add_member(before.add_group("Survey"), alice, role="manager")
    token = before.issue("access", alice.id, hub.id, scope, resource_server=hub.id).value
    gone = before.issue("access", alice.id, hub.id, scope).value
    before.revoke(gone)
    key = before.key()

    after = AuthDirectory(path=path)
    assert path.stat().st_mode & 0o077 == 0
    assert after.identity_of(token) == alice == after.account("alice@example.edu")
    assert after.identity_of(gone) is None
    assert after.client(hub.id) == hub
    assert after.dependencies(scope) == (GROUPS_SCOPE,)
    assert after.key().private_numbers() == key.private_numbers()
    [kept] = after.groups()
    assert kept == group
