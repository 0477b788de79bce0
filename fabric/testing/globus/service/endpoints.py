"""The routes about endpoints: their registration, status and allowed functions."""

from __future__ import annotations

import secrets
import time
from datetime import UTC, datetime
from typing import Annotated
from uuid import UUID, uuid4

from fastapi import APIRouter, Body

from fabric.testing.globus.auth import Account
from fabric.testing.globus.service.access import Access, Caller, Rejected
from fabric.testing.globus.service.queues import Queues
from fabric.testing.globus.service.records import Endpoint, Json, Report, UserEndpoint
from fabric.testing.globus.service.store import Store

LOCK_S = 60.0
Document = Annotated[Json, Body()]


def get_endpoint_router(access: Access, store: Store, queues: Queues) -> APIRouter:
    """Return the routes."""
    routes = _Endpoints(access, store, queues)
    router = APIRouter()

    @router.post("/v3/endpoints")
    def register(document: Document, caller: Caller) -> Json:
        return routes.register(str(uuid4()), document, caller)

    @router.post("/v2/endpoints")
    def register_v2(document: Document, caller: Caller) -> Json:
        return {**routes.register(str(uuid4()), document, caller), "warnings": []}

    @router.put("/v3/endpoints/{endpoint_id}")
    def update(endpoint_id: UUID, document: Document, caller: Caller) -> Json:
        return routes.register(str(endpoint_id), document, caller)

    @router.post("/v3/endpoints/{endpoint_id}/lock")
    @router.post("/v2/endpoints/{endpoint_id}/lock")
    def lock(endpoint_id: UUID, caller: Caller) -> Json:
        return routes.lock(str(endpoint_id), caller)

    @router.get("/v2/endpoints")
    def list_all(caller: Caller, role: str = "owner") -> list[Json]:
        return routes.list(caller, role)

    @router.get("/v2/endpoints/{endpoint_id}")
    def describe(endpoint_id: UUID, caller: Caller) -> Json:
        return routes.describe(str(endpoint_id), caller)

    @router.get("/v2/endpoints/{endpoint_id}/status")
    def status(endpoint_id: UUID, caller: Caller) -> Json:
        return routes.status(str(endpoint_id), caller)

    @router.delete("/v2/endpoints/{endpoint_id}")
    def delete(endpoint_id: UUID, caller: Caller) -> Json:
        store.delete(access.endpoint(str(endpoint_id), caller, owned=True))
        return {"result": 302}

    @router.get("/v3/endpoints/{endpoint_id}/allowed_functions")
    def allowed_functions(endpoint_id: UUID, caller: Caller) -> Json:
        allowed = access.endpoint(str(endpoint_id), caller).allowed_functions
        return {
            "endpoint_id": str(endpoint_id),
            "restricted": allowed is not None,
            "functions": [*(allowed or [])],
        }

    return router


def get_agent_queues(
    queues: Queues, account: str, secret: str, *, core: bool, report_for: str
) -> Json:
    """Make the queues of an agent, and return how it reaches them.

    Args:
        queues: The broker.
        account: The agent's endpoint id, its account's name too.
        secret: Its password.
        core: Whether it is a core agent, which takes commands, or one that takes tasks.
        report_for: The endpoint it sends heartbeats and results for.
    """
    work = "commands" if core else "tasks"
    queue = f"{account}.{work}"
    queues.declare(queue, work, queue)
    results, heartbeats = f"{report_for}.results", f"{report_for}.heartbeat"
    url = queues.allow(
        account,
        secret,
        reads=f"^{account}\\.{work}$",
        writes={"results": results, "heartbeats": heartbeats},
    )
    return {
        "endpoint_id": account,
        f"{'command' if core else 'task'}_queue_info": {
            "connection_url": url,
            "exchange": work,
            "queue": queue,
        },
        "result_queue_info": _publishing(url, "results", results),
        "heartbeat_queue_info": _publishing(url, "heartbeats", heartbeats),
    }


def _publishing(url: str, exchange: str, key: str) -> Json:
    return {
        "connection_url": url,
        "exchange": exchange,
        "queue": exchange,
        "queue_publish_kwargs": {
            "exchange": exchange,
            "routing_key": key,
            "mandatory": True,
            "properties": {"delivery_mode": 2, "content_type": "application/octet-stream"},
        },
    }


class _Endpoints:
    def __init__(self, access: Access, store: Store, queues: Queues) -> None:
        self._access = access
        self._store = store
        self._queues = queues

    def register(self, endpoint_id: str, document: Json, caller: Account) -> Json:
        known = self._store.get(Endpoint, endpoint_id)
        if known is not None:
            self._access.endpoint(endpoint_id, caller, owned=True)
            if known.locked_until > time.time():
                reason = f"Endpoint {endpoint_id} is locked"
                raise Rejected(423, "RESOURCE_LOCKED", reason)
        secret = known.secret if known is not None else secrets.token_hex(16)
        self._store.put(
            Endpoint(id=endpoint_id, owner=caller.id, registration=document, secret=secret)
        )
        # The SDK's fixtures give a task queue to every endpoint; a core agent reads commands.
        own = get_agent_queues(self._queues, endpoint_id, secret, core=True, report_for=endpoint_id)
        return {**own, "task_queue_info": own["command_queue_info"]}

    def lock(self, endpoint_id: str, caller: Account) -> Json:
        endpoint = self._access.endpoint(endpoint_id, caller, owned=True)
        until = time.time() + LOCK_S
        self._store.put(endpoint.model_copy(update={"locked_until": until}))
        return {
            "endpoint_id": endpoint_id,
            "lock_expiration_timestamp": datetime.fromtimestamp(until, UTC).isoformat(),
        }

    def list(self, caller: Account, role: str) -> list[Json]:
        return [
            {
                "uuid": one.id,
                "name": one.registration.get("endpoint_name"),
                "display_name": one.registration.get("display_name"),
                "owner": one.owner,
            }
            for one in self._store.all(Endpoint)
            if one.owner == caller.id or (role == "any" and one.multi_user)
        ]

    def describe(self, endpoint_id: str, caller: Account) -> Json:
        registration = self._access.endpoint(endpoint_id, caller).registration
        metadata = registration.get("metadata")
        known: Json = metadata if isinstance(metadata, dict) else {}
        return {
            "uuid": endpoint_id,
            "name": registration.get("endpoint_name"),
            "display_name": registration.get("display_name"),
            "multi_user": registration.get("multi_user", False),
            "public": registration.get("public", False),
            "description": registration.get("description", ""),
            "subscription_uuid": registration.get("subscription_uuid"),
            "ip_address": "127.0.0.1",
            # Agents do not tell; both are released together.
            "sdk_version": known.get("endpoint_version"),
            **known,
        }

    def status(self, endpoint_id: str, caller: Account) -> Json:
        user_endpoint = self._store.get(UserEndpoint, endpoint_id)
        self._access.endpoint(user_endpoint.parent if user_endpoint else endpoint_id, caller)
        report = self._store.get(Report, endpoint_id)
        online = report is not None and report.online(time.time())
        return {
            "status": "online" if online else "offline",
            "details": report.state if report is not None else {},
        }
