"""``GET /v1/models``: the models a client may name."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request

from fabric.catalog import ModelVersion
from fabric.gateway.access import Needs
from fabric.gateway.hub import caller_of, hub_of
from fabric.gateway.replies import Json

router = APIRouter(prefix="/v1", tags=["openai"], dependencies=[Depends(Needs("query"))])


@router.get("/models")
async def list_models(request: Request) -> Json:
    """Return every model that the caller may use, named as its newest version is reached."""
    hub = hub_of(request)
    seen = await hub.seen_by(caller_of(request))
    newest: dict[str, ModelVersion] = {}
    for version in await hub.offload(seen.models):
        newest.setdefault(version.name, version)
    return {"object": "list", "data": [_model(name, v) for name, v in newest.items()]}


@router.get("/models/{name:path}")
async def read_model(request: Request, name: str) -> Json:
    """Return one model, by ``name`` or ``name@revision``."""
    hub = hub_of(request)
    seen = await hub.seen_by(caller_of(request))
    return _model(name, await hub.offload(seen.resolve, name))


def _model(name: str, version: ModelVersion) -> Json:
    return {
        "id": name,
        "object": "model",
        "created": int(version.created_at.timestamp()),
        "owned_by": "fabric",
        "fabric": {
            "revision": version.revision,
            "digest": version.digest,
            "context_tokens": version.context_tokens,
        },
    }
