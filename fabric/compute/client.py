"""Clients of the Globus Compute service: JSON only, within a budget, with our errors.

Importing this module imports the SDK (a second); others import it only when they need a client.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import globus_compute_sdk
import globus_sdk
from globus_compute_sdk.errors import ComputeError
from globus_compute_sdk.sdk._environments import get_web_service_url
from globus_compute_sdk.sdk.auth.globus_app import get_globus_app
from globus_compute_sdk.sdk.batch import Batch, UserRuntime, create_user_runtime
from globus_compute_sdk.serialize import (
    ComputeSerializer,
    JSONData,
    PureSourceTextInspect,
)
from globus_sdk.authorizers import GlobusAuthorizer
from globus_sdk.scopes import ComputeScopes

from fabric.compute.limits import RequestBudget, ServiceLimits
from fabric.errors import (
    CredentialsRefused,
    FabricError,
    ServiceBusy,
    ServiceRefused,
    ServiceUnreachable,
)

RESULT_SERIALIZERS = ("globus_compute_sdk.serialize.concretes.JSONData",)
"""What endpoints are asked to write results with."""

MAX_REFUSALS = 30

RETRY_AFTER_S = 10.0
"""How long to send nothing after a 429 that does not say."""


class ServiceClient(globus_compute_sdk.Client):
    """A client that never unpickles, and whose submits look the same from every machine."""

    def __init__(self, authorizer: GlobusAuthorizer) -> None:
        super().__init__(authorizer=authorizer, do_version_check=False)
        self.fx_serializer = ComputeSerializer(
            strategy_code=PureSourceTextInspect,
            strategy_data=JSONData,
            allowed_deserializer_types=[JSONData, PureSourceTextInspect],
        )
        web = self._compute_web_client
        for version in (web.v2, web.v3):
            # A 429 concerns everything this identity sends, so the pool deals with it.
            version.retry_config.retry_after_status_codes = (503,)
            version.retry_config.transient_error_status_codes = (500, 502, 503, 504)
        # Submits that fail are repeated by the pool. One retry is left for expired tokens.
        web.v3.retry_config.max_retries = 1

    def get_endpoint_status(self, endpoint_uuid: UUID) -> dict[str, Any]:
        """Return an endpoint's status, or fail soon: whoever asks has other places to look."""
        with self._compute_web_client.v2.retry_config.tune(max_retries=1):
            answer: dict[str, Any] = super().get_endpoint_status(endpoint_uuid)
        return answer

    def create_batch(self, *args: Any, **kwargs: Any) -> Batch:
        """Return a batch as the SDK makes it, with the pinned runtime."""
        batch = super().create_batch(*args, **kwargs)
        batch.user_runtime = get_pinned_runtime()
        return batch

    def get_result_amqp_url(self) -> Any:
        """Return where results are read; the SDK's result thread asks, and may not be refused.

        It ends, and with it every open task, when it was refused five times.
        """
        for _ in range(MAX_REFUSALS):
            try:
                return super().get_result_amqp_url()
            except globus_sdk.GlobusAPIError as error:
                if error.http_status != 429:
                    raise
                time.sleep(_get_retry_after_s(error))
        return super().get_result_amqp_url()


class _BudgetedAuthorizer(GlobusAuthorizer):
    """Asks the budget before every request: the SDK wants a fresh header for each one it sends,
    also for those it repeats by itself."""

    def __init__(self, authorizer: GlobusAuthorizer, budget: RequestBudget) -> None:
        self._authorizer = authorizer
        self._budget = budget

    def get_authorization_header(self) -> str | None:
        header = self._authorizer.get_authorization_header()
        self._budget.acquire()
        return header

    def handle_missing_authorization(self) -> bool:
        return self._authorizer.handle_missing_authorization()


def get_client(
    budget: RequestBudget | None = None,
    *,
    client_id: str | None = None,
    client_secret: str | None = None,
    app: globus_sdk.GlobusApp | None = None,
) -> ServiceClient:
    """Return a client; may ask Globus Auth for a token.

    Without ``client_id`` and ``app`` it is whoever the SDK finds: the client in
    ``GLOBUS_COMPUTE_CLIENT_ID`` and ``GLOBUS_COMPUTE_CLIENT_SECRET``, else a stored login.

    Args:
        budget: The identity's budget; one of its own when ``None``.
        client_id: A confidential client's id.
        client_secret: Its secret.
        app: A login, as globus-sdk keeps it.

    Raises:
        CredentialsRefused: Globus does not accept the credentials, or nobody has logged in.
        ServiceUnreachable: Globus Auth does not answer.
    """
    with service_errors():
        if client_id is not None:
            confidential = globus_sdk.ConfidentialAppAuthClient(client_id, client_secret or "")
            authorizer: GlobusAuthorizer = globus_sdk.ClientCredentialsAuthorizer(
                confidential, ComputeScopes.all
            )
        else:
            authorizer = _get_app_authorizer(app or get_globus_app())
        return ServiceClient(
            _BudgetedAuthorizer(authorizer, budget or RequestBudget(ServiceLimits()))
        )


def get_service_url() -> str:
    """Return where the service is, as the SDK in this environment has it."""
    return str(get_web_service_url())


def get_pinned_runtime() -> UserRuntime:
    """Return the runtime that submits name.

    An endpoint keeps one user endpoint, with batch jobs of its own, for each runtime it is told;
    this one changes with neither machine nor patch release.
    """
    runtime = create_user_runtime()
    python = dataclasses.replace(
        runtime.python,
        version="3.11.0",
        version_description="3.11.0",
        version_tuple=(3, 11, 0),
        version_info=(3, 11, 0, "final", 0),
        compiler="",
    )
    platform = dataclasses.replace(
        runtime.platform,
        architecture=("", ""),
        machine="",
        node="fabric",
        platform="",
        processor="",
        release="",
    )
    return dataclasses.replace(
        runtime,
        globus_compute_sdk_version="4.19.0",
        globus_sdk_version="4.9.1",
        python_version="3.11.0",
        python=python,
        platform=platform,
    )


@contextmanager
def service_errors() -> Iterator[None]:
    """Raise what the SDKs raise inside as our own errors."""
    try:
        yield
    except FabricError:
        raise
    except (globus_sdk.GlobusError, ComputeError, OSError) as error:
        raise translate(error) from error


def translate(error: BaseException) -> FabricError:
    """Return our error for one of the SDKs', or for a connection that broke."""
    match error:
        case FabricError():
            return error
        case globus_sdk.AuthAPIError():
            return CredentialsRefused(reason=f"{error.http_status} {error.message}")
        case globus_sdk.GlobusAPIError(http_status=401):
            return CredentialsRefused(reason=f"401 {_get_reason(error)}")
        case globus_sdk.GlobusAPIError(http_status=429):
            return ServiceBusy(retry_after_s=_get_retry_after_s(error))
        case globus_sdk.GlobusAPIError(http_status=status) if status >= 500:
            return ServiceUnreachable(reason=f"it answered {status} {_get_reason(error)}")
        case globus_sdk.GlobusAPIError(http_status=status, code=code):
            return ServiceRefused(status=status, reason_code=code or "", reason=_get_reason(error))
        case _:
            return ServiceUnreachable(reason=str(error) or type(error).__name__)


def _get_app_authorizer(app: globus_sdk.GlobusApp) -> GlobusAuthorizer:
    rs = ComputeScopes.resource_server
    app.add_scope_requirements({rs: [ComputeScopes.all]})
    if isinstance(app, globus_sdk.UserApp) and app.login_required():
        raise CredentialsRefused(reason="nobody has logged in here")
    return app.get_authorizer(rs)


def _get_reason(error: globus_sdk.GlobusAPIError) -> str:
    body = error.raw_json if isinstance(error.raw_json, dict) else {}
    return str(body.get("reason") or error.message or error.http_reason or "")


def _get_retry_after_s(error: globus_sdk.GlobusAPIError) -> float:
    try:
        return float((error.headers or {}).get("Retry-After", RETRY_AFTER_S))
    except ValueError:
        return RETRY_AFTER_S
