"""The routes about functions."""

from __future__ import annotations

from uuid import UUID, uuid4

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, JsonValue

from fabric.testing.globus.service.access import Access, Caller
from fabric.testing.globus.service.records import Function, Json
from fabric.testing.globus.service.store import Store


class Registration(BaseModel):
    """A function as it is registered."""

    model_config = ConfigDict(extra="allow")

    function_name: str
    function_code: str
    serialized: bool = True
    description: str | None = None
    meta: dict[str, JsonValue] | None = None
    public: bool = False
    group: UUID | None = None


def get_function_router(access: Access, store: Store) -> APIRouter:
    """Return the routes."""
    router = APIRouter()

    @router.post("/v3/functions")
    @router.post("/v2/functions")
    def register(function: Registration, caller: Caller) -> Json:
        access.check_size(caller, "The function", len(function.function_code))
        registration = function.model_dump(mode="json")
        record = Function(id=str(uuid4()), owner=caller.id, registration=registration)
        store.put(record)
        return {"function_uuid": record.id}

    @router.get("/v2/functions/{function_id}")
    def describe(function_id: UUID, caller: Caller) -> Json:
        known = access.function(str(function_id), caller).registration
        return {
            "function_uuid": str(function_id),
            "function_name": known["function_name"],
            "function_code": known["function_code"],
            "description": known["description"],
            "metadata": known["meta"],
        }

    @router.delete("/v2/functions/{function_id}")
    def delete(function_id: UUID, caller: Caller) -> Json:
        store.delete(access.function(str(function_id), caller, owned=True))
        return {"result": 302}

    return router
