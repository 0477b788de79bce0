"""Globus logins: a person's, kept on this machine, or a service's own.

Importing this imports globus-sdk; ``import fabric.sdk`` does not import this.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import httpx
from globus_sdk import (
    AuthLoginClient,
    ClientApp,
    ConfidentialAppAuthClient,
    GlobusAPIError,
    GlobusApp,
    GlobusAppConfig,
    GlobusError,
    NativeAppAuthClient,
    NetworkError,
    OAuthTokenResponse,
    UserApp,
)
from globus_sdk.authorizers import RenewingAuthorizer
from globus_sdk.gare import GlobusAuthorizationParameters
from globus_sdk.login_flows import LoginFlowManager
from globus_sdk.token_storage import (
    MemoryTokenStorage,
    SQLiteTokenStorage,
    TokenStorage,
    TokenValidationError,
)
from globus_sdk.transport import RequestsTransport, RetryConfig

from fabric.config import ClientSettings, StateDir, globus_scope_of
from fabric.errors import AuthUnavailable, LoginFailed, LoginRequired, SettingInvalid

TIMEOUT_S = 20.0
RETRY_AFTER_S = 5.0
FRESH_S = 60.0
"""A token with less time left than this is renewed before it is sent."""

Ask = Callable[[str], str]
"""Shows somebody the address to log in at, and returns the code they got there."""


class Login:
    """One hub's login. Thread-safe; its methods may wait for Globus Auth.

    Tokens are kept for each hub's address apart, so that one hub never gets another's.

    Args:
        settings: The hub, and the application that logs in; with a secret it is a service, which
            logs in as itself and keeps nothing.
        state_dir: Where a person's tokens are kept, readable by their owner alone.
    """

    def __init__(self, settings: ClientSettings, state_dir: Path) -> None:
        if not settings.globus_hub_client_id or not settings.globus_client_id:
            missing = "client" if settings.globus_hub_client_id else "hub_client"
            raise SettingInvalid(
                setting=f"client.globus_{missing}_id",
                value=None,
                reason="a login with Globus needs it; the hub's administrators know its value",
            )
        self._url = settings.base_url.rstrip("/").removesuffix("/v1")
        self._server = settings.globus_hub_client_id
        self._scope = settings.globus_scope or globus_scope_of(self._server)
        self._client_id = settings.globus_client_id
        self._secret = settings.globus_client_secret
        self._path = StateDir(state_dir).login_path
        self._lock = threading.Lock()
        self._open = ExitStack()
        self._open_app = ExitStack()
        self._storage: TokenStorage | None = None
        self._authorizer: RenewingAuthorizer[OAuthTokenResponse] | None = None

    @property
    def is_service(self) -> bool:
        """Whether a service logs in as itself."""
        return self._secret is not None

    def known_token(self) -> str | None:
        """Return the access token if it is at hand and has time left; does not wait."""
        authorizer = self._authorizer
        if authorizer is None or authorizer.expires_at is None:
            return None
        return authorizer.access_token if time.time() < authorizer.expires_at - FRESH_S else None

    def token(self) -> str:
        """Return an access token for the hub, renewed if it is about to end.

        Raises:
            LoginRequired: Nobody is logged in, or the login is over.
            AuthUnavailable: Globus Auth does not answer.
        """
        with self._lock, self._answering():
            if self._authorizer is None:
                self._authorizer = self._get_authorizer()
            return _bearer(self._authorizer)

    def renew(self, refused: str) -> str:
        """Return another access token than the one that the hub refused.

        Whoever comes second, in this process or another one, gets what the first has fetched.

        Raises:
            LoginRequired: The login is over.
            AuthUnavailable: Globus Auth does not answer.
        """
        with self._lock, self._answering():
            self._authorizer = self._get_authorizer()
            if _bearer(self._authorizer) == refused:
                self._authorizer.handle_missing_authorization()
            return _bearer(self._authorizer)

    def log_in(self, ask: Ask) -> None:
        """Log somebody in. What was kept of an earlier login is kept until this one succeeds.

        Raises:
            LoginFailed: Globus Auth did not accept the code.
            AuthUnavailable: Globus Auth does not answer.
            SettingInvalid: The tokens cannot be kept in the state directory.
        """
        kept = MemoryTokenStorage()
        with self._lock, self._app(kept, ask) as app:
            storage = self._make_storage()
            try:
                app.login(force=True)
            except NetworkError as error:
                raise _unavailable(error) from error
            except GlobusError as error:
                raise LoginFailed(reason=_reason(error)) from error
            storage.store_token_data_by_resource_server(kept.get_token_data_by_resource_server())
            self._authorizer = None

    def log_out(self) -> bool:
        """Revoke and forget the tokens.

        Returns:
            Whether Globus Auth confirmed it; where it could not be asked, they are forgotten here
            and end by themselves.

        Raises:
            LoginRequired: Nobody is logged in.
        """
        with self._lock, self._answering():
            storage = self._get_storage()
            servers = list(storage.get_token_data_by_resource_server())
            if not servers:
                raise LoginRequired(url=self._url)
            self._authorizer = None
            with self._app(storage) as app:
                try:
                    app.logout(sweep=True)
                    revoked = True
                except GlobusError:
                    for server in servers:
                        storage.remove_token_data(server)
                    revoked = False
            if not self.is_service:
                # Deleted rows would stay readable in the file.
                with closing(sqlite3.connect(self._path)) as connection:
                    connection.execute("VACUUM")
        return revoked

    def close(self) -> None:
        """Close files and connections. Calling it twice is harmless."""
        with self._lock:
            self._authorizer = self._storage = None
            self._open_app.close()
            self._open.close()

    def _get_authorizer(self) -> RenewingAuthorizer[OAuthTokenResponse]:
        """Return what renews the tokens in the storage, as they are there now."""
        self._open_app.close()
        app = self._open_app.enter_context(self._app(self._get_storage()))
        authorizer = app.get_authorizer(self._server)
        assert isinstance(authorizer, RenewingAuthorizer)
        return authorizer

    @contextmanager
    def _app(self, storage: TokenStorage, ask: Ask | None = None) -> Iterator[GlobusApp]:
        transport = RequestsTransport(http_timeout=TIMEOUT_S)
        retries = RetryConfig(max_retries=1, max_sleep=1)
        scopes = {self._server: [self._scope]}
        with ExitStack() as stack:
            stack.callback(transport.close)
            if self._secret is not None:
                service = ConfidentialAppAuthClient(
                    self._client_id, self._secret, transport=transport, retry_config=retries
                )
                config = GlobusAppConfig(token_storage=storage, token_validation_error_handler=None)
                app: GlobusApp = ClientApp(
                    "fabric", login_client=service, scope_requirements=scopes, config=config
                )
            else:
                client = NativeAppAuthClient(
                    self._client_id, transport=transport, retry_config=retries
                )
                config = GlobusAppConfig(
                    token_storage=storage,
                    token_validation_error_handler=None,
                    request_refresh_tokens=True,
                    login_flow_manager=_AskingFlow(client, ask or _ask_nobody),
                )
                app = UserApp(
                    "fabric", login_client=client, scope_requirements=scopes, config=config
                )
            yield stack.enter_context(app)

    def _get_storage(self) -> TokenStorage:
        if self._storage is None and self.is_service:
            self._storage = MemoryTokenStorage()
        if self._storage is None and not self._path.exists():
            raise LoginRequired(url=self._url)
        return self._open_storage()

    def _make_storage(self) -> TokenStorage:
        """Return the storage, made if need be, before anybody is asked to log in for nothing."""
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            storage = self._open_storage()
            self._path.chmod(0o600)
            storage.get_token_data_by_resource_server()
        except (OSError, sqlite3.Error) as error:
            raise SettingInvalid(
                setting="state_dir",
                value=self._path,
                reason=f"logins cannot be kept there ({error}); delete that file, or choose another"
                " directory",
            ) from error
        return storage

    def _open_storage(self) -> TokenStorage:
        if self._storage is None:
            storage = SQLiteTokenStorage(
                self._path, namespace=self._url, connect_params={"check_same_thread": False}
            )
            self._open.callback(storage.close)
            self._storage = storage
        return self._storage

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except TokenValidationError as error:
            raise LoginRequired(url=self._url) from error
        except NetworkError as error:
            raise _unavailable(error) from error
        except GlobusAPIError as error:
            if error.http_status >= 500:
                raise _unavailable(error) from error
            raise LoginRequired(url=self._url, reason=_reason(error)) from error
        except sqlite3.Error as error:
            raise LoginRequired(url=self._url, reason=f"{self._path}: {error}") from error


class LoginAuth(httpx.Auth):
    """Sends a login's token; renews it once where the hub says that its time is over."""

    def __init__(self, login: Login) -> None:
        self._login = login

    async def async_auth_flow(
        self, request: httpx.Request
    ) -> AsyncGenerator[httpx.Request, httpx.Response]:
        """Yield the request, and once more if its token had expired."""
        token = self._login.known_token()
        if token is None:
            token = await asyncio.to_thread(self._login.token)
        request.headers["authorization"] = f"Bearer {token}"
        response = yield request
        if response.status_code == httpx.codes.UNAUTHORIZED and await _has_expired(response):
            token = await asyncio.to_thread(self._login.renew, token)
            request.headers["authorization"] = f"Bearer {token}"
            yield request


class _AskingFlow(LoginFlowManager):
    def __init__(self, client: NativeAppAuthClient, ask: Ask) -> None:
        super().__init__(client, request_refresh_tokens=True, native_prefill_named_grant="fabric")
        self._ask = ask

    def run_login_flow(self, auth_parameters: GlobusAuthorizationParameters) -> OAuthTokenResponse:
        client: AuthLoginClient = self.login_client
        redirect_uri = f"{client.base_url}v2/web/auth-code"
        code = self._ask(self._get_authorize_url(auth_parameters, redirect_uri))
        return client.oauth2_exchange_code_for_tokens(code.strip())


def _ask_nobody(_url: str) -> str:
    raise AssertionError("a login is asked for by log_in alone")


def _bearer(authorizer: RenewingAuthorizer[OAuthTokenResponse]) -> str:
    return authorizer.get_authorization_header().removeprefix("Bearer ")


async def _has_expired(response: httpx.Response) -> bool:
    await response.aread()
    with suppress(ValueError, KeyError, TypeError):
        return bool(response.json()["error"]["code"] == "token_expired")
    return False


def _unavailable(error: GlobusError) -> AuthUnavailable:
    return AuthUnavailable(reason=_reason(error), retry_after_s=RETRY_AFTER_S)


def _reason(error: GlobusError) -> str:
    """Return what happened, without what was sent."""
    if isinstance(error, GlobusAPIError):
        known = (error.raw_json or {}).get("error", "no reason given")
        return f"it answered {error.http_status} ({known})"
    return type(error).__name__
