"""Embeddings of a vLLM server: asked by token ids, and held to what the model's files compute.

Shapes: H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fabric.engine.pooling import Kind, pool
from fabric.engine.vllm.protocol import NAME, Json, get_unreadable
from fabric.errors import BackendFailed
from fabric.messages import unpack_floats

KINDS: tuple[Kind, ...] = ("mean", "last", "first")

_NUM_SAMPLED = 8
_TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}
"""Of the cosine between a server's vector and the one that is expected, by dtype."""

Pooled = Mapping[Kind, Tensor]
"""The vector [H] that each way of pooling gives."""


def get_sample(vocabulary: int) -> list[int]:
    """Return a few token ids to compare a server by."""
    return [(7 * i * i + 3 * i + 1) % vocabulary for i in range(_NUM_SAMPLED)]


def pool_sample(model: PreTrainedModel, ids: Sequence[int]) -> Pooled:
    """Return what the model's own code makes of the ids, in float32."""
    with torch.inference_mode():
        hidden_1TH = model.base_model(input_ids=torch.tensor([ids])).last_hidden_state
        mask_1T = torch.ones(1, len(ids), dtype=torch.long)
        return {kind: pool(hidden_1TH, mask_1T, [kind])[0] for kind in KINDS}


def find_pooling(vector_H: Tensor, pooled: Pooled, *, dtype: str) -> Kind | None:
    """Return how a server pools the sample; ``None`` where its vector is none of these."""
    likeness = {
        kind: float(torch.cosine_similarity(vector_H, expected_H, dim=0))
        for kind, expected_H in pooled.items()
    }
    best = max(likeness, key=lambda kind: likeness[kind])
    return best if likeness[best] > 1.0 - _TOLERANCE[dtype] else None


def get_body(ids: Sequence[int], served_name: str, *, salt: str) -> dict[str, Any]:
    """Return the body of ``POST /v1/embeddings``; prefixes are shared among those of one salt."""
    return {
        "model": served_name,
        "input": [list(ids)],
        "encoding_format": "base64",
        "cache_salt": salt,
    }


def read_vector(reply: Json, *, num_tokens: int, dimensions: int) -> Tensor:
    """Return the vector [H] of a reply to one prompt, in float32.

    Args:
        reply: As the server sent it.
        num_tokens: The prompt's.
        dimensions: The model's hidden size.

    Raises:
        BackendFailed: There is none, it is of another length, or of another number of tokens.
    """
    try:
        vector = unpack_floats(reply["data"][0]["embedding"])
        num_read = int(reply["usage"]["prompt_tokens"])
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise get_unreadable(error) from error
    if (num_read, len(vector)) != (num_tokens, dimensions):
        reason = (
            f"it made a vector of {len(vector)} numbers from {num_read} tokens, where"
            f" {dimensions} from {num_tokens} were due"
        )
        raise BackendFailed(backend=NAME, reason=reason)
    return torch.tensor(vector)
