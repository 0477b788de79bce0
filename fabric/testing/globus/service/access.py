"""Who calls, how often they may, and what they are told when they may not."""

from __future__ import annotations

import math
import threading
import time
from collections import defaultdict, deque
from typing import Annotated

from fastapi import Depends, Request
from fastapi.responses import JSONResponse

from fabric.testing.globus.auth import Account, AuthDirectory
from fabric.testing.globus.service.records import Endpoint, Function
from fabric.testing.globus.service.settings import PublishedLimits
from fabric.testing.globus.service.store import Store

RESOURCE_SERVER = "funcx_service"


class Rejected(Exception):
    """A request that the service answers with an error.

    Args:
        status: The HTTP status.
        code: What programs go by.
        reason: What people read.
        headers: More headers of the answer.
    """

    def __init__(
        self, status: int, code: str, reason: str, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(reason)
        body = {"status": "Failed", "code": code, "reason": reason, "http_status_code": status}
        self.reply = JSONResponse(body, status, headers)


class Access:
    """Names the caller of a request, and holds them to the published limits."""

    def __init__(self, directory: AuthDirectory, store: Store, limits: PublishedLimits) -> None:
        self._directory = directory
        self._store = store
        self._limits = limits
        self._lock = threading.Lock()
        self._answered: defaultdict[str, deque[float]] = defaultdict(deque)

    def caller(self, request: Request) -> Account:
        """Return whose request it is.

        Raises:
            Rejected: 401 without a good token, 429 after too many requests.
        """
        scheme, _, value = request.headers.get("authorization", "").partition(" ")
        grant = self._directory.grant(value, "access") if scheme == "Bearer" else None
        if grant is None or grant.resource_server != RESOURCE_SERVER:
            raise Rejected(401, "USER_UNAUTHENTICATED", "The request has no good bearer token")
        account = self._directory.account(grant.subject)
        request.state.user = account.name
        self._count(account)
        return account

    def _count(self, account: Account) -> None:
        now = time.monotonic()
        limits = self._limits
        with self._lock:
            answered = self._answered[account.id]
            while answered and answered[0] <= now - limits.window_s:
                answered.popleft()
            if len(answered) < limits.requests:
                answered.append(now)
                return
            wait_s = math.ceil(answered[0] + limits.window_s - now)
        self._store.add_violation(
            f"{account.name}: more than {limits.requests} requests in {limits.window_s:g} s"
        )
        raise Rejected(
            429, "TOO_MANY_REQUESTS", f"Retry in {wait_s} s", {"Retry-After": str(wait_s)}
        )

    def check_size(self, account: Account, what: str, num_bytes: int) -> None:
        """Refuse what is larger than the service takes.

        Raises:
            Rejected: 413.
        """
        allowed = self._limits.payload_bytes
        if num_bytes > allowed:
            reason = f"{what} has {num_bytes} bytes; at most {allowed} are allowed"
            self._store.add_violation(f"{account.name}: {reason}")
            raise Rejected(413, "PAYLOAD_TOO_LARGE", reason)

    def endpoint(self, endpoint_id: str, caller: Account, *, owned: bool = False) -> Endpoint:
        """Return an endpoint that the caller may use, or owns.

        Raises:
            Rejected: 404, or 403 for someone else's.
        """
        endpoint = self._store.get(Endpoint, endpoint_id)
        if endpoint is None:
            reason = f"Endpoint {endpoint_id} could not be resolved"
            raise Rejected(404, "ENDPOINT_NOT_FOUND", reason)
        if endpoint.owner != caller.id and (owned or not endpoint.multi_user):
            reason = f"Endpoint {endpoint_id} is not accessible to {caller.username}"
            raise Rejected(403, "ENDPOINT_ACCESS_FORBIDDEN", reason)
        return endpoint

    def function(self, function_id: str, caller: Account, *, owned: bool = False) -> Function:
        """Return a function that the caller may call, or owns.

        Raises:
            Rejected: 404, or 403 for one that was not shared with them.
        """
        function = self._store.get(Function, function_id)
        if function is None:
            reason = f"Function {function_id} could not be resolved"
            raise Rejected(404, "FUNCTION_NOT_FOUND", reason)
        shared = function.public or self._is_member(caller, function.group)
        if function.owner != caller.id and (owned or not shared):
            reason = f"Function {function_id} is not accessible to {caller.username}"
            raise Rejected(403, "FUNCTION_ACCESS_FORBIDDEN", reason)
        return function

    def _is_member(self, account: Account, group_id: str | None) -> bool:
        identities = (account.id, *account.linked)
        return any(
            group.id == group_id and group.members.get(one, ("", ""))[1] == "active"
            for group in self._directory.groups()
            for one in identities
        )


def get_caller(request: Request) -> Account:
    """Return whose request it is; see ``Access.caller``."""
    access = request.app.state.access
    assert isinstance(access, Access)
    return access.caller(request)


Caller = Annotated[Account, Depends(get_caller)]
