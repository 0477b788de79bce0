"""Attention that kernels never write down, computed again from queries, keys and values.

Shapes: n tokens of one run, H query heads, K key-value heads, G = H / K, D head size, S keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fabric.engine.attention import Scoring


def visible_of(start: int, count: int, window: int) -> Tensor:
    """Return which of its keys each token of a run sees, [n, S]."""
    at_n1 = torch.arange(start, start + count)[:, None]
    keys_S = torch.arange(start + count)
    visible_nS = keys_S <= at_n1
    return visible_nS & (keys_S > at_n1 - window) if window else visible_nS


def scores_of(q_nHD: Tensor, k_SKD: Tensor, scoring: Scoring) -> Tensor:
    """Return the scores of a run's tokens before any is masked, [n, H, S] in float32."""
    num, num_heads, size = q_nHD.shape
    q_KGnD = q_nHD.transpose(0, 1).reshape(k_SKD.shape[1], -1, num, size)
    scores_KGnS = (q_KGnD @ k_SKD.permute(1, 2, 0)[:, None]).float() * scoring.scale
    if scoring.cap:
        scores_KGnS = torch.tanh(scores_KGnS / scoring.cap) * scoring.cap
    return scores_KGnS.reshape(num_heads, num, -1).transpose(0, 1)


def weighted_of(pattern_nHS: Tensor, v_SKD: Tensor) -> Tensor:
    """Return the values that a pattern takes, [n, H, D]."""
    num, num_heads, num_keys = pattern_nHS.shape
    p_KGnS = pattern_nHS.to(v_SKD.dtype).transpose(0, 1).reshape(v_SKD.shape[1], -1, num, num_keys)
    out_KGnD = p_KGnS @ v_SKD.transpose(0, 1)[:, None]
    return out_KGnD.reshape(num_heads, num, -1).transpose(0, 1)
