"""How a mixture's router chooses experts of its logits, found by what it chose.

Shapes: N tokens, E experts, k chosen ones.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Route = Callable[[Tensor], tuple[Tensor, Tensor]]
"""logits_NE -> (scores_Nk, indices_Nk)"""


def route_of(logits_NE: Tensor, scores_Nk: Tensor, indices_Nk: Tensor) -> Route | None:
    """Return the way that leads from logits to these choices, if it is one that is known.

    It is a softmax, the largest k of it, and in some models their sum made 1.
    """
    for sums_to_one in (True, False):

        def route(logits_NE: Tensor, sums_to_one: bool = sums_to_one) -> tuple[Tensor, Tensor]:
            top = torch.softmax(logits_NE.float(), -1).topk(indices_Nk.shape[-1], -1)
            scores_Nk_ = top.values
            if sums_to_one:
                scores_Nk_ = scores_Nk_ / scores_Nk_.sum(-1, keepdim=True)
            return scores_Nk_.to(scores_Nk.dtype), top.indices

        scores, indices = route(logits_NE)
        if torch.equal(indices, indices_Nk) and torch.allclose(scores, scores_Nk, atol=1e-3):
            return route
    return None
