"""A stand-in of Globus Auth and Groups: the routes that globus-sdk calls.

Source: docs.globus.org/api/auth/reference, and the response fixtures of ``globus_sdk.testing``,
with which a contract test compares it.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Mapping
from typing import Annotated, Any
from urllib.parse import parse_qsl, urlencode

import jwt
from fastapi import APIRouter, Depends, Request
from fastapi.responses import PlainTextResponse, RedirectResponse, Response
from globus_sdk import GlobusError
from globus_sdk.scopes import ScopeParser
from jwt.algorithms import RSAAlgorithm

from fabric.testing.globus.calls import Refused, RefusingRoute, token_of_bearer
from fabric.testing.globus.directory import (
    DEFAULT_SCOPE,
    GROUPS_SCOPE,
    Account,
    AuthClient,
    AuthDirectory,
    Group,
)
from fabric.testing.globus.groups import GroupsRoutes

__all__ = ["GROUPS_SCOPE", "Account", "AuthClient", "AuthDirectory", "Group", "get_auth_router"]

Json = dict[str, Any]

_DEPENDENT_TOKEN = "urn:globus:auth:grant_type:dependent_token"  # noqa: S105
_IDENTITY_PROVIDER = "41143743-f3c8-4d60-bbdb-eeecaba85bd9"
_SERVER = "auth.globus.org"


def get_auth_router(directory: AuthDirectory) -> APIRouter:
    """Return the routes of Globus Auth (``/v2/oauth2``, ``/v2/api``) and Groups (``/v2/groups``).

    A person's browser is whoever follows the authorize URL with ``login_as=<username>`` added: the
    page it ends on shows the code alone.
    """
    auth, groups = _Auth(directory), GroupsRoutes(directory)
    router = APIRouter(route_class=RefusingRoute)
    for method, path, answer in (
        ("GET", "/.well-known/openid-configuration", auth.openid_configuration),
        ("GET", "/jwk.json", auth.jwks),
        ("GET", "/v2/oauth2/authorize", auth.authorize),
        ("GET", "/v2/web/auth-code", auth.show_code),
        ("POST", "/v2/oauth2/token", auth.token),
        ("POST", "/v2/oauth2/token/introspect", auth.introspect),
        ("POST", "/v2/oauth2/token/revoke", auth.revoke),
        ("GET", "/v2/oauth2/userinfo", auth.userinfo),
        ("GET", "/v2/api/identities", auth.identities),
        ("GET", "/v2/groups/my_groups", groups.mine),
        ("GET", "/v2/groups/{group_id}", groups.one),
    ):
        router.add_api_route(path, answer, methods=[method], response_model=None)
    return router


async def _form(request: Request) -> dict[str, str]:
    return dict(parse_qsl((await request.body()).decode()))


Form = Annotated[dict[str, str], Depends(_form)]


class _Auth:
    def __init__(self, directory: AuthDirectory) -> None:
        self._directory = directory

    def openid_configuration(self, request: Request) -> Json:
        base = str(request.base_url)
        return {
            "issuer": base.rstrip("/"),
            "jwks_uri": f"{base}jwk.json",
            "authorization_endpoint": f"{base}v2/oauth2/authorize",
            "token_endpoint": f"{base}v2/oauth2/token",
            "userinfo_endpoint": f"{base}v2/oauth2/userinfo",
            "revocation_endpoint": f"{base}v2/oauth2/token/revoke",
            "id_token_signing_alg_values_supported": ["RS256"],
        }

    def jwks(self) -> Json:
        key = json.loads(RSAAlgorithm.to_jwk(self._directory.key().public_key()))
        return {"keys": [{**key, "alg": "RS256", "use": "sig"}]}

    def authorize(self, request: Request) -> Response:
        asked = request.query_params
        client = self._directory.client(asked.get("client_id", ""))
        back = asked.get("redirect_uri")
        if client is None or back is None or asked.get("response_type") != "code":
            raise Refused(400, "invalid_request", "Client, redirect URI or response type is wrong.")
        if client.secret is None and asked.get("code_challenge_method") != "S256":
            raise Refused(400, "invalid_request", "A native client needs PKCE.")
        scope = asked.get("scope", "")
        self._by_server(scope)
        try:
            account = self._directory.account(asked.get("login_as", ""))
        except KeyError:
            raise Refused(401, "unauthorized", "Nobody of this name can log in.") from None
        code = self._directory.issue(
            "code",
            account.id,
            client.id,
            scope,
            challenge=asked.get("code_challenge"),
            redirect_uri=back,
            offline=asked.get("access_type") == "offline",
        )
        answer = {"code": code.value, "state": asked.get("state", "")}
        return RedirectResponse(f"{back}?{urlencode(answer)}", 302)

    def show_code(self, code: str) -> Response:
        return PlainTextResponse(code)

    def token(self, request: Request, form: Form) -> Any:
        match form.get("grant_type"):
            case "client_credentials":
                client = self._confidential(request)
                scope = form.get("scope", DEFAULT_SCOPE)
                return self._grant_all(request, client, client.id, scope, offline=False)
            case "authorization_code":
                return self._exchange(request, form)
            case "refresh_token":
                return self._refresh(request, form)
            case kind if kind == _DEPENDENT_TOKEN:
                return self._grant_dependent(request, form)
            case _:
                raise Refused(400, "unsupported_grant_type")

    def introspect(self, request: Request, form: Form) -> Json:
        client = self._confidential(request)
        grant = self._directory.grant(form.get("token", ""), "access")
        if grant is None or client.id not in grant.audience:
            return {"active": False}
        account = self._directory.account(grant.subject)
        known = {
            "active": True,
            "token_type": "Bearer",
            "scope": grant.scope,
            "client_id": grant.client_id,
            "username": account.username,
            "name": account.name,
            "email": account.email,
            "exp": int(grant.expires_at or 0),
            "iat": int(grant.issued_at),
            "nbf": int(grant.issued_at),
            "sub": account.id,
            "aud": grant.audience,
            "iss": "https://auth.globus.org",
        }
        if "identity_set" in form.get("include", "").split(","):
            known["identity_set"] = [account.id, *account.linked]
        return known

    def revoke(self, request: Request, form: Form) -> Json:
        client = self._client(request, form)
        for kind in ("access", "refresh"):
            grant = self._directory.grant(form.get("token", ""), kind)
            if grant is not None and grant.client_id == client.id:
                self._directory.revoke(grant.value)
        return {"active": False}

    def userinfo(self, request: Request) -> Json:
        grant = token_of_bearer(self._directory, request, _SERVER, ["openid"])
        account = self._directory.account(grant.subject)
        linked = [self._directory.account(one) for one in account.linked]
        return {
            **self._profile(account),
            "identity_set": [self._profile(one) for one in (account, *linked)],
        }

    def identities(self, request: Request, ids: str = "", usernames: str = "") -> Json:
        if request.headers.get("authorization", "").startswith("Basic "):
            self._confidential(request)
        else:
            token_of_bearer(self._directory, request, _SERVER, [])
        wanted = {*ids.split(","), *usernames.split(",")}
        return {
            "identities": [
                {
                    "id": one.id,
                    "username": one.username,
                    "name": one.name,
                    "email": one.email,
                    "organization": "Example University",
                    "identity_provider": _IDENTITY_PROVIDER,
                    "identity_type": "login",
                    "status": "used",
                }
                for one in self._directory.accounts()
                if wanted & {one.id, one.username}
            ]
        }

    def _profile(self, account: Account) -> Json:
        return {
            "sub": account.id,
            "preferred_username": account.username,
            "username": account.username,
            "name": account.name,
            "email": account.email,
            "organization": "Example University",
            "identity_provider": _IDENTITY_PROVIDER,
            "identity_provider_display_name": "Example University",
            "last_authentication": int(self._directory.clock()),
        }

    def _exchange(self, request: Request, form: Mapping[str, str]) -> Json:
        client = self._client(request, form)
        code = self._directory.grant(form.get("code", ""), "code")
        self._directory.revoke(form.get("code", ""))
        verifier = hashlib.sha256(form.get("code_verifier", "").encode()).digest()
        challenge = base64.urlsafe_b64encode(verifier).decode().rstrip("=")
        if (
            code is None
            or code.client_id != client.id
            or code.redirect_uri != form.get("redirect_uri")
            or code.challenge not in (None, challenge)
        ):
            raise Refused(401, "invalid_grant")
        reply = self._grant_all(request, client, code.subject, code.scope, offline=code.offline)
        return reply | {"state": "_default"}

    def _refresh(self, request: Request, form: Mapping[str, str]) -> Json:
        client = self._client(request, form)
        refresh = self._directory.grant(form.get("refresh_token", ""), "refresh")
        if refresh is None or refresh.client_id != client.id:
            raise Refused(400, "invalid_grant")
        reply = self._grant_all(request, client, refresh.subject, refresh.scope, offline=False)
        return reply | {"refresh_token": refresh.value}

    def _grant_dependent(self, request: Request, form: Mapping[str, str]) -> list[Json]:
        client = self._confidential(request)
        token = self._directory.grant(form.get("token", ""), "access")
        if token is None or token.resource_server != client.id:
            raise Refused(400, "invalid_grant")
        consented = [d for s in token.scope.split() for d in self._directory.dependencies(s)]
        asked = form.get("scope", " ".join(consented))
        by_server = self._by_server(asked) if asked else {}
        wanted = {one for scope in by_server.values() for one in scope.split()}
        if wanted - set(consented):
            raise Refused(403, "dependent_consent_required", "Missing required dependent consent")
        offline = form.get("access_type") == "offline"
        return [
            self._grant(client, token.subject, server, scope, offline=offline)
            for server, scope in by_server.items()
        ]

    def _grant_all(
        self,
        request: Request,
        client: AuthClient,
        subject: str,
        scope: str,
        *,
        offline: bool,
    ) -> Json:
        by_server = self._by_server(scope)
        first, *others = [
            self._grant(client, subject, server, scope, offline=offline)
            for server, scope in by_server.items()
        ]
        if "openid" in by_server.get(_SERVER, "").split():
            first["id_token"] = self._id_token(request, client, subject)
        return first | {"other_tokens": others}

    def _grant(
        self, client: AuthClient, subject: str, server: str, scope: str, *, offline: bool
    ) -> Json:
        issue = self._directory.issue
        access = issue("access", subject, client.id, scope, resource_server=server)
        refresh: Json = {}
        if offline:
            grant = issue("refresh", subject, client.id, scope, resource_server=server)
            refresh = {"refresh_token": grant.value}
        return {
            "access_token": access.value,
            "scope": scope,
            "expires_in": int(self._directory.token_lifetime_s),
            "token_type": "Bearer",
            "resource_server": server,
            **refresh,
        }

    def _by_server(self, scope: str) -> dict[str, str]:
        """Return what is asked of each resource server; dependencies are not kept."""
        by_server: dict[str, str] = {}
        try:
            asked = [one.scope_string for one in ScopeParser.parse(scope)]
        except GlobusError:
            raise Refused(400, "malformed_scope_error") from None
        for one in asked:
            server = self._directory.server_of(one)
            if server is None:
                raise Refused(400, "unknown_scope_error", f"Unknown scope: {one}")
            by_server[server] = f"{by_server.get(server, '')} {one}".strip()
        if not by_server:
            raise Refused(400, "missing_scope_error")
        return by_server

    def _id_token(self, request: Request, client: AuthClient, subject: str) -> str:
        now = int(self._directory.clock())
        account = self._directory.account(subject)
        claims = {
            "iss": str(request.base_url).rstrip("/"),
            "sub": subject,
            "aud": client.id,
            "iat": now,
            "exp": now + 172_800,
            "preferred_username": account.username,
            "name": account.name,
            "email": account.email,
        }
        return jwt.encode(claims, self._directory.key(), "RS256")

    def _client(self, request: Request, form: Mapping[str, str]) -> AuthClient:
        """Return who calls: a confidential client by its secret, a native one by its name."""
        if request.headers.get("authorization", "").startswith("Basic "):
            return self._confidential(request)
        client = self._directory.client(form.get("client_id", ""))
        if client is None or client.secret is not None:
            raise Refused(401, "invalid_client")
        return client

    def _confidential(self, request: Request) -> AuthClient:
        scheme, _, encoded = request.headers.get("authorization", "").partition(" ")
        try:
            client_id, _, secret = base64.b64decode(encoded, validate=True).decode().partition(":")
        except ValueError:
            raise Refused(401, "invalid_client") from None
        client = self._directory.client(client_id) if scheme == "Basic" else None
        known = (client.secret if client is not None else None) or ""
        if client is None or not hmac.compare_digest(known.encode(), secret.encode()) or not secret:
            raise Refused(401, "invalid_client")
        return client
