"""Who a rig knows."""

from __future__ import annotations

from dataclasses import dataclass, field

from fabric.testing.globus.auth import AuthDirectory, Group

NAMES = ("site-a", "site-b", "alice", "bob", "hub")
GROUP = "researchers"


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """A confidential client of the stand-in's Globus Auth, which is an identity of its own.

    Attributes:
        name: How tests call it.
        client_id: What it logs in with.
        client_secret: What proves it.
        identity_id: Its Globus identity.
        username: That identity's name.
    """

    name: str
    client_id: str
    client_secret: str = field(repr=False)
    identity_id: str
    username: str


def add_users(directory: AuthDirectory) -> tuple[dict[str, User], Group]:
    """Register every user, and a group with alice and the hub in it."""
    users: dict[str, User] = {}
    for name in NAMES:
        client = directory.add_client(name)
        assert client.secret is not None
        users[name] = User(
            name=name,
            client_id=client.id,
            client_secret=client.secret,
            identity_id=client.id,
            username=directory.account(client.id).username,
        )
    group = directory.add_group(GROUP)
    for name in ("alice", "hub"):
        group = directory.add_member(group, directory.account(users[name].identity_id))
    return users, group
