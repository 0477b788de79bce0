"""The routes about tasks, and how a user hears of their results."""

from __future__ import annotations

import secrets
from uuid import UUID

from fastapi import APIRouter
from pydantic import BaseModel

from fabric.testing.globus.auth import Account
from fabric.testing.globus.service.access import Caller, Rejected
from fabric.testing.globus.service.queues import Queues
from fabric.testing.globus.service.records import Json, ResultReader, Task
from fabric.testing.globus.service.store import Store


class TaskIds(BaseModel):
    """Tasks to be looked up."""

    task_ids: list[UUID]


def get_task_router(store: Store, queues: Queues) -> APIRouter:
    """Return the routes."""
    router = APIRouter()

    def own(task_id: UUID, caller: Account) -> Task | None:
        task = store.task(str(task_id))
        return task if task is not None and task.owner == caller.id else None

    @router.get("/v2/tasks/{task_id}")
    def describe(task_id: UUID, caller: Caller) -> Json:
        task = own(task_id, caller)
        if task is None:
            raise Rejected(404, "TASK_NOT_FOUND", f"Task {task_id} could not be resolved")
        return task.to_document()

    @router.post("/v2/batch_status")
    def describe_all(ids: TaskIds, caller: Caller) -> Json:
        found = {str(one): own(one, caller) for one in ids.task_ids}
        unknown = {"status": "unknown"}
        return {
            "response": "batch",
            "results": {
                one: task.to_document() if task is not None else {"task_id": one, **unknown}
                for one, task in found.items()
            },
        }

    @router.get("/v2/taskgroup/{group_id}")
    def describe_group(group_id: UUID, caller: Caller) -> Json:
        tasks = store.tasks_of_group(str(group_id))
        if not tasks:
            reason = f"Task group {group_id} could not be resolved"
            raise Rejected(404, "TASK_GROUP_NOT_FOUND", reason)
        if tasks[0].owner != caller.id:
            reason = f"Task group {group_id} is not accessible to {caller.username}"
            raise Rejected(403, "TASK_GROUP_ACCESS_FORBIDDEN", reason)
        return {
            "taskgroup_id": str(group_id),
            "create_websockets_queue": any(task.queued for task in tasks),
            "tasks": [{"id": task.id, "created_at": task.created_at} for task in tasks],
        }

    @router.get("/v2/get_amqp_result_connection_url")
    def result_url(caller: Caller) -> Json:
        reader = store.get(ResultReader, caller.id)
        if reader is None:
            reader = ResultReader(id=caller.id, secret=secrets.token_hex(16))
            store.put(reader)
        account = f"results-{caller.id}"
        url = queues.allow(account, reader.secret, reads=f"^{caller.id}\\..*$", writes={})
        return {"queue_prefix": f"{caller.id}.", "connection_url": url}

    return router
