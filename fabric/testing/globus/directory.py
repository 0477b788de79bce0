"""What the stand-in of Globus Auth and Groups knows: accounts, clients, scopes, groups, tokens."""

from __future__ import annotations

import json
import secrets
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, generate_private_key

GROUPS_SCOPE = "urn:globus:auth:scope:groups.api.globus.org:view_my_groups_and_memberships"
DEFAULT_SCOPE = "urn:globus:auth:scope:transfer.api.globus.org:all"
CODE_LIFETIME_S = 600.0

_NAMED_SERVERS = {"facd7ccc-c5f4-42aa-916b-a0e270e2c2a9": "funcx_service"}
"""Resource servers that Globus Auth calls by a name instead of their client's id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """An identity, of a person or of a client; ``linked`` are the person's other identities."""

    id: str
    username: str
    name: str
    email: str
    linked: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthClient:
    """A registered application; a native one has no secret."""

    id: str
    name: str
    secret: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A group, and what each member is in it: a role and a status."""

    id: str
    name: str
    visibility: Literal["authenticated", "private"]
    members: Mapping[str, tuple[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """A token or a code: whose, for whom, for what, until when (epoch seconds)."""

    value: str
    kind: Literal["access", "refresh", "code"]
    subject: str
    client_id: str
    resource_server: str
    scope: str
    issued_at: float
    expires_at: float | None
    challenge: str | None = None
    redirect_uri: str | None = None
    offline: bool = False

    @property
    def audience(self) -> list[str]:
        """Who may ask about the token: the server it is for, and the client it was issued to."""
        ids = (rs_id for rs_id, name in _NAMED_SERVERS.items() if name == self.resource_server)
        return list(dict.fromkeys((self.resource_server, *ids, self.client_id)))


@dataclass(slots=True)
class _State:
    accounts: dict[str, Account] = field(default_factory=dict)
    clients: dict[str, AuthClient] = field(default_factory=dict)
    scopes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    groups: dict[str, Group] = field(default_factory=dict)
    grants: dict[str, Grant] = field(default_factory=dict)
    key_pem: str = ""


class AuthDirectory:
    """The state behind ``get_auth_router``. Thread-safe.

    Args:
        token_lifetime_s: How long an access token is good for.
        path: A file the state is kept in, so that a restarted service knows its tokens.
        clock: Epoch seconds.
    """

    def __init__(
        self,
        *,
        token_lifetime_s: float = 172_800,
        path: Path | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.token_lifetime_s = token_lifetime_s
        self.clock = clock
        self._path = path
        self._lock = threading.RLock()
        self._key: RSAPrivateKey | None = None
        self._state = _State() if path is None or not path.exists() else _load(path.read_text())

    # Who and what there is

    def add_user(self, username: str, *, name: str = "", linked: Iterable[str] = ()) -> Account:
        """Add a person."""
        identity = str(uuid.uuid4())
        return self._add_account(identity, username, name or username, tuple(linked))

    def add_client(
        self, name: str, *, client_id: str | None = None, secret: str | None = None
    ) -> AuthClient:
        """Add a confidential client, which has an identity of its own (with the same id)."""
        client_id = client_id or str(uuid.uuid4())
        self._add_account(client_id, f"{client_id}@clients.auth.globus.org", name, ())
        return self._add_client(client_id, name, secret or secrets.token_urlsafe(24))

    def add_native_client(self, name: str) -> AuthClient:
        """Add an application that people log in with and that keeps no secret."""
        return self._add_client(str(uuid.uuid4()), name, None)

    def add_scope(
        self, client: AuthClient, name: str = "all", *, dependencies: Iterable[str] = ()
    ) -> str:
        """Register a scope of a resource server, with the scopes it may get dependent tokens for.

        Returns:
            The scope, as it is asked for.
        """
        scope = f"https://auth.globus.org/scopes/{client.id}/{name}"
        with self._lock:
            self._state.scopes[scope] = tuple(dependencies)
            self._save()
        return scope

    def add_group(
        self, name: str, *, visibility: Literal["authenticated", "private"] = "private"
    ) -> Group:
        """Add a group without members; who is not one sees it only if it is not private."""
        group = Group(id=str(uuid.uuid4()), name=name, visibility=visibility, members={})
        return self._put_group(group)

    def add_member(
        self, group: Group, account: Account, *, role: str = "member", status: str = "active"
    ) -> Group:
        """Make somebody a member, or change what they are."""
        with self._lock:
            known = self._state.groups[group.id]
            members = {**known.members, account.id: (role, status)}
            return self._put_group(replace(known, members=members))

    def remove_member(self, group: Group, account: Account) -> Group:
        """End a membership."""
        with self._lock:
            known = self._state.groups[group.id]
            members = {one: what for one, what in known.members.items() if one != account.id}
            return self._put_group(replace(known, members=members))

    def accounts(self) -> list[Account]:
        """Return all identities."""
        with self._lock:
            return list(self._state.accounts.values())

    def account(self, identity: str) -> Account:
        """Return an identity, by its id or username (``KeyError`` if there is none)."""
        with self._lock:
            by_name = {one.username: one for one in self._state.accounts.values()}
            return self._state.accounts.get(identity) or by_name[identity]

    def client(self, client_id: str) -> AuthClient | None:
        """Return a client, if there is one."""
        with self._lock:
            return self._state.clients.get(client_id)

    def groups(self) -> list[Group]:
        """Return all groups."""
        with self._lock:
            return list(self._state.groups.values())

    def dependencies(self, scope: str) -> tuple[str, ...]:
        """Return for what a scope's server may get dependent tokens."""
        with self._lock:
            return self._state.scopes.get(scope, ())

    def server_of(self, scope: str) -> str | None:
        """Return the resource server of a scope, or ``None`` if there is no such scope."""
        if scope in ("openid", "profile", "email"):
            return "auth.globus.org"
        if scope.startswith("urn:globus:auth:scope:") and scope.count(":") == 5:
            return scope.split(":")[4]
        client_id = scope.removeprefix("https://auth.globus.org/scopes/").partition("/")[0]
        with self._lock:
            known = client_id in _NAMED_SERVERS or scope in self._state.scopes
        return _NAMED_SERVERS.get(client_id, client_id) if known else None

    # Tokens and codes

    def issue(
        self,
        kind: Literal["access", "refresh", "code"],
        subject: str,
        client_id: str,
        scope: str,
        *,
        resource_server: str = "",
        **more: Any,
    ) -> Grant:
        """Issue a token or a code."""
        now = self.clock()
        lifetime_s = {"access": self.token_lifetime_s, "code": CODE_LIFETIME_S, "refresh": None}[
            kind
        ]
        grant = Grant(
            # The alphabet and length of Globus Auth's own.
            value=secrets.token_hex(16) if kind == "code" else f"Ag{secrets.token_hex(46)}",
            kind=kind,
            subject=subject,
            client_id=client_id,
            resource_server=resource_server,
            scope=scope,
            issued_at=now,
            expires_at=None if lifetime_s is None else now + lifetime_s,
            **more,
        )
        with self._lock:
            self._state.grants[grant.value] = grant
            self._save()
        return grant

    def grant(self, value: str, kind: Literal["access", "refresh", "code"]) -> Grant | None:
        """Return what a token or code stands for, while it is good."""
        with self._lock:
            grant = self._state.grants.get(value)
        if grant is None or grant.kind != kind:
            return None
        expired = grant.expires_at is not None and grant.expires_at <= self.clock()
        return None if expired else grant

    def grants(self) -> list[Grant]:
        """Return all tokens and codes that were not revoked."""
        with self._lock:
            return list(self._state.grants.values())

    def identity_of(self, bearer: str) -> Account | None:
        """Return whose access token this is, while it is good."""
        grant = self.grant(bearer, "access")
        return None if grant is None else self.account(grant.subject)

    def revoke(self, value: str) -> None:
        """End a token or code for good; an unknown one is no error."""
        with self._lock:
            self._state.grants.pop(value, None)
            self._save()

    def expire_tokens(self) -> None:
        """Let the time of all access tokens be over."""
        with self._lock:
            for grant in self._state.grants.values():
                if grant.kind == "access":
                    self._state.grants[grant.value] = replace(grant, expires_at=self.clock())
            self._save()

    def key(self) -> RSAPrivateKey:
        """Return the key that signs ID tokens."""
        with self._lock:
            if self._key is None:
                self._key = self._load_key()
            return self._key

    def _load_key(self) -> RSAPrivateKey:
        if self._state.key_pem:
            key = serialization.load_pem_private_key(self._state.key_pem.encode(), None)
            assert isinstance(key, RSAPrivateKey)
            return key
        key = generate_private_key(public_exponent=65537, key_size=2048)
        self._state.key_pem = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ).decode()
        self._save()
        return key

    def _add_account(
        self, identity: str, username: str, name: str, linked: tuple[str, ...]
    ) -> Account:
        account = Account(id=identity, username=username, name=name, email=username, linked=linked)
        with self._lock:
            self._state.accounts[identity] = account
            self._save()
        return account

    def _add_client(self, client_id: str, name: str, secret: str | None) -> AuthClient:
        client = AuthClient(id=client_id, name=name, secret=secret)
        with self._lock:
            self._state.clients[client_id] = client
            self._save()
        return client

    def _put_group(self, group: Group) -> Group:
        with self._lock:
            self._state.groups[group.id] = group
            self._save()
        return group

    def _save(self) -> None:
        if self._path is not None:
            written = self._path.with_suffix(".new")
            written.touch(mode=0o600)
            written.write_text(json.dumps(asdict(self._state)))
            written.replace(self._path)


def _load(text: str) -> _State:
    data = json.loads(text)
    for account in data["accounts"].values():
        account["linked"] = tuple(account["linked"])
    for group in data["groups"].values():
        group["members"] = {one: tuple(what) for one, what in group["members"].items()}
    return _State(
        accounts={key: Account(**value) for key, value in data["accounts"].items()},
        clients={key: AuthClient(**value) for key, value in data["clients"].items()},
        scopes={key: tuple(value) for key, value in data["scopes"].items()},
        groups={key: Group(**value) for key, value in data["groups"].items()},
        grants={key: Grant(**value) for key, value in data["grants"].items()},
        key_pem=data["key_pem"],
    )
