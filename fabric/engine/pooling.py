"""From the hidden states of a prompt's tokens to its one vector of length 1.

Shapes: B rows, T tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fabric.engine.device import put
from fabric.errors import RequestInvalid, RowFailed
from fabric.messages import Request, pack_floats

Kind = Literal["mean", "last", "first"]
"""Which hidden states make the vector."""


def check_dimensions(request: Request, actual: int) -> None:
    """Refuse a request for a vector of another length than the model's.

    Raises:
        RequestInvalid: It is.
    """
    if request.dimensions not in (None, actual):
        raise RequestInvalid(
            param="dimensions",
            value=request.dimensions,
            reason=f"the model's embeddings have {actual}; leave it out",
        )


def pool(hidden_BTH: Tensor, mask_BT: Tensor, kinds: Sequence[Kind]) -> Tensor:
    """Return one vector a row, not normalised.

    Args:
        hidden_BTH: The last hidden states; rows are padded at their end.
        mask_BT: 1 where a token is, else 0.
        kinds: How each row is pooled.

    Returns:
        [B, H] in float32.
    """
    hidden_BTH, weights_BT1 = hidden_BTH.float(), mask_BT.unsqueeze(-1).float()
    lengths_B = mask_BT.sum(1)
    pooled_BH = (hidden_BTH * weights_BT1).sum(1) / lengths_B.unsqueeze(-1)
    rows_B = torch.arange(len(kinds), device=mask_BT.device)
    ends = {"last": lengths_B - 1, "first": torch.zeros_like(lengths_B)}
    for kind, at_B in ends.items():
        chosen = put([one == kind for one in kinds], mask_BT.device)
        pooled_BH[chosen] = hidden_BTH[rows_B, at_B][chosen]
    return pooled_BH


def pack_normalised(vector_H: Tensor) -> str:
    """Return the vector at length 1, as an ``Embedding`` carries it.

    Raises:
        RowFailed: It has no direction, or is not finite.
    """
    vector_H = vector_H.float()
    length = torch.linalg.vector_norm(vector_H)
    if not torch.isfinite(length) or length == 0:
        raise RowFailed(reason="the model's hidden states for it are not finite")
    return pack_floats((vector_H / length).tolist())
