"""The routes that take tasks."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any
from uuid import NAMESPACE_OID, UUID, uuid4, uuid5

from fastapi import APIRouter
from globus_compute_common.messagepack import pack
from globus_compute_common.messagepack.message_types import Task as TaskMessage
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from fabric.testing.globus.auth import Account, AuthDirectory
from fabric.testing.globus.service.access import Access, Caller, Rejected
from fabric.testing.globus.service.endpoints import get_agent_queues
from fabric.testing.globus.service.queues import Outgoing, Queues
from fabric.testing.globus.service.records import Endpoint, Function, Json, Task, UserEndpoint
from fabric.testing.globus.service.settings import PublishedLimits
from fabric.testing.globus.service.store import Store


class Batch(BaseModel):
    """Tasks for one endpoint: the payloads of each function."""

    model_config = ConfigDict(extra="allow")

    tasks: dict[UUID, list[str]]
    task_group_id: UUID = Field(default_factory=uuid4)
    create_queue: bool = False
    user_endpoint_config: dict[str, JsonValue] = {}
    user_runtime: dict[str, JsonValue] = {}
    resource_specification: dict[str, JsonValue] | None = None
    result_serializers: list[str] | None = None

    @property
    def headers(self) -> dict[str, Any]:
        """What every task message says beside its function and id."""
        headers: dict[str, Any] = {}
        if self.resource_specification:
            headers["resource_specification"] = json.dumps(self.resource_specification)
        if self.result_serializers:
            headers["result_serializers"] = self.result_serializers
        return headers


class BatchV2(BaseModel):
    """Tasks as (function, endpoint, payload), as older clients send them."""

    model_config = ConfigDict(extra="allow")

    tasks: list[tuple[UUID, UUID, str]]
    task_group_id: UUID = Field(default_factory=uuid4)
    create_websocket_queue: bool = False


class Submission:
    """Turns batches into tasks on the queues of user endpoints."""

    def __init__(
        self,
        access: Access,
        store: Store,
        queues: Queues,
        directory: AuthDirectory,
        limits: PublishedLimits,
    ) -> None:
        self._access = access
        self._store = store
        self._queues = queues
        self._directory = directory
        self._limits = limits

    def submit(self, endpoint_id: str, batch: Batch, caller: Account) -> Json:
        """Take a batch, all of it or nothing.

        Raises:
            Rejected: An unknown or forbidden endpoint or function, or too large a payload.
        """
        endpoint = self._access.endpoint(endpoint_id, caller)
        functions = {
            str(function_id): self._permitted(endpoint, str(function_id), caller)
            for function_id in batch.tasks
        }
        num_bytes = sum(len(payload) for its in batch.tasks.values() for payload in its)
        self._access.check_size(caller, "The submission", num_bytes)
        self._check_group(batch, caller)
        target = self._user_endpoint(endpoint, batch, caller)
        ids: dict[str, list[str]] = {}
        tasks, messages = [], []
        for task, function, payload in self._tasks(batch, target, functions, caller):
            ids.setdefault(function.id, []).append(task.id)
            tasks.append(task)
            messages.append(_message(task, function, payload, batch))
        self._store.put_tasks(tasks)
        if batch.create_queue:
            self.declare_group(str(batch.task_group_id), caller.id)
        self._queues.send([self.start_command(target), *messages])
        return {
            "request_id": str(uuid4()),
            "task_group_id": str(batch.task_group_id),
            "endpoint_id": endpoint_id,
            "tasks": {one: [*its] for one, its in ids.items()},
        }

    def declare_group(self, group: str, owner: str) -> None:
        """Make the queue of a task group's results."""
        kept_ms = int(self._limits.result_kept_s * 1000)
        self._queues.declare(f"{owner}.{group}", "taskgroups", group, kept_ms=kept_ms)

    def start_command(self, target: UserEndpoint) -> Outgoing:
        """Return the command that starts a user endpoint.

        A core agent ignores it while the user endpoint runs, but keeps it for one that is just
        stopping, so it goes out with every batch.
        """
        credentials = get_agent_queues(
            self._queues, target.id, target.secret, core=False, report_for=target.id
        )
        command = {
            "command": "cmd_start_endpoint",
            "args": [],
            "kwargs": {
                "name": f"uep.{target.parent}.{target.id}",
                "user_opts": target.options,
                "user_runtime": target.runtime,
                "amqp_creds": credentials,
            },
            "globus_effective_identity": target.identities[0]["sub"],
            "globus_username": target.identities[0]["username"],
            "globus_identity_set": target.identities,
        }
        properties = {"content_type": "application/json", "timestamp": round(time.time())}
        key = f"{target.parent}.commands"
        body = json.dumps(command).encode()
        return Outgoing(exchange="commands", key=key, body=body, properties=properties)

    def _permitted(self, endpoint: Endpoint, function_id: str, caller: Account) -> Function:
        function = self._access.function(function_id, caller)
        allowed = endpoint.allowed_functions
        if allowed is not None and function_id not in allowed:
            reason = f"Function {function_id} not permitted on endpoint {endpoint.id}"
            raise Rejected(403, "FUNCTION_NOT_PERMITTED", reason)
        return function

    def _check_group(self, batch: Batch, caller: Account) -> None:
        tasks = self._store.tasks_of_group(str(batch.task_group_id), limit=1)
        if any(task.owner != caller.id for task in tasks):
            reason = f"Task group {batch.task_group_id} is not accessible to {caller.username}"
            raise Rejected(403, "TASK_GROUP_ACCESS_FORBIDDEN", reason)

    def _user_endpoint(self, endpoint: Endpoint, batch: Batch, caller: Account) -> UserEndpoint:
        what = (endpoint.id, caller.id, batch.user_endpoint_config, batch.user_runtime)
        id_ = str(uuid5(NAMESPACE_OID, json.dumps(what, sort_keys=True)))
        known = self._store.get(UserEndpoint, id_)
        if known is not None:
            return known
        made = UserEndpoint(
            id=id_,
            parent=endpoint.id,
            identities=[self._identity(one) for one in (caller.id, *caller.linked)],
            options=batch.user_endpoint_config,
            runtime=batch.user_runtime,
            secret=secrets.token_hex(16),
        )
        self._store.put(made)
        return made

    def _identity(self, identity: str) -> Json:
        account = self._directory.account(identity)
        return {
            "sub": account.id,
            "username": account.username,
            "name": account.name,
            "email": account.email,
            "organization": None,
            "identity_provider": None,
        }

    def _tasks(
        self, batch: Batch, target: UserEndpoint, functions: dict[str, Function], caller: Account
    ) -> Iterator[tuple[Task, Function, str]]:
        now = datetime.now(UTC).isoformat()
        for function_id, payloads in batch.tasks.items():
            for payload in payloads:
                task = Task(
                    id=str(uuid4()),
                    group=str(batch.task_group_id),
                    owner=caller.id,
                    endpoint=target.id,
                    created_at=now,
                    queued=batch.create_queue,
                )
                yield task, functions[str(function_id)], payload


def get_submission_router(submission: Submission) -> APIRouter:
    """Return the routes."""
    router = APIRouter()

    @router.post("/v3/endpoints/{endpoint_id}/submit")
    def submit(endpoint_id: UUID, batch: Batch, caller: Caller) -> Json:
        return submission.submit(str(endpoint_id), batch, caller)

    @router.post("/v2/submit")
    def submit_v2(batch: BatchV2, caller: Caller) -> Json:
        results: list[JsonValue] = []
        for function_id, endpoint_id, payload in batch.tasks:
            one = Batch(
                tasks={function_id: [payload]},
                task_group_id=batch.task_group_id,
                create_queue=batch.create_websocket_queue,
            )
            taken = submission.submit(str(endpoint_id), one, caller)["tasks"]
            assert isinstance(taken, dict)
            (ids,) = taken.values()
            assert isinstance(ids, list)
            results.append(
                {
                    "status": "success",
                    "task_uuid": ids[0],
                    "http_status_code": 200,
                    "reason": None,
                }
            )
        group = str(batch.task_group_id)
        return {"response": "success", "task_group_id": group, "results": results}

    return router


def _message(task: Task, function: Function, payload: str, batch: Batch) -> Outgoing:
    body = pack(TaskMessage(task_id=UUID(task.id), task_buffer=function.code + payload))
    headers = {**batch.headers, "function_uuid": function.id, "task_uuid": task.id}
    key = f"{task.endpoint}.tasks"
    return Outgoing(exchange="tasks", key=key, body=body, properties={"headers": headers})
