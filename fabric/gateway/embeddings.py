"""``POST /v1/embeddings``: texts as vectors, each text a run of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from fabric.gateway.access import DirectRoute, Needs
from fabric.gateway.bodies import documented, read_body
from fabric.gateway.exchange import Exchange
from fabric.gateway.hub import caller_of
from fabric.gateway.openai_models import EmbeddingBody
from fabric.gateway.replies import Json
from fabric.messages import Embedding, RunCompleted, RunFailed

MAX_AT_ONCE = 64
"""Runs of one request in flight at once; at most half of what the caller may have."""

router = APIRouter(
    prefix="/v1",
    tags=["openai"],
    dependencies=[Depends(Needs("query"))],
    route_class=DirectRoute,
)


@router.post("/embeddings", openapi_extra=documented(EmbeddingBody))
async def create_embeddings(request: Request) -> Response:
    """Turn one or several texts into vectors of length 1."""
    body = await read_body(request, EmbeddingBody)
    embeddings: list[Embedding] = []
    ends: list[RunCompleted] = []
    at_once = max(1, min(MAX_AT_ONCE, caller_of(request).max_concurrent // 2))
    asked = list(body.requests())
    for begin in range(0, len(asked), at_once):
        async with await Exchange.begin(request, asked[begin : begin + at_once]) as exchange:
            async for _, event in exchange.events():
                match event:
                    case Embedding():
                        embeddings.append(event)
                    case RunCompleted():
                        ends.append(event)
                    case RunFailed():
                        raise event.failure.to_error()
    return Response(
        json.dumps(_reply(body, embeddings, ends)),
        headers={"x-fabric-site": ends[0].site},
        media_type="application/json",
    )


def _reply(
    body: EmbeddingBody, embeddings: Sequence[Embedding], ends: Sequence[RunCompleted]
) -> Json:
    packed = body.encoding_format == "base64"
    prompt_tokens = sum(end.usage.prompt_tokens for end in ends)
    return {
        "object": "list",
        "model": body.model,
        "data": [
            {"object": "embedding", "index": index, "embedding": one.data if packed else one.vector}
            for index, one in enumerate(embeddings)
        ],
        "usage": {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens},
        "fabric": {
            "runs": [end.run for end in ends],
            "sites": sorted({end.site for end in ends}),
            "model": ends[0].model,
            "digest": ends[0].digest,
            "charge_usu": sum(end.charge_usu for end in ends),
        },
    }
