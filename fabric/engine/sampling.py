"""Chooses tokens from logits, and scores them.

Every choice depends on the row's own logits, its sampling parameters and one number in [0, 1) made
from (seed, choice, position): not on the batch around it, and it can be made again at any position.

Shapes: R rows, V vocabulary, C candidates (the most probable tokens, in descending order).
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fabric.engine.device import put
from fabric.messages import Sampling

_FEW_CANDIDATES = 1024
"""How many candidates are tried before the whole vocabulary is sorted for top-p."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """How one token is chosen; ``uniform`` is in [0, 1) and unused when greedy."""

    temperature: float
    top_k: int
    top_p: float
    uniform: float
    min_p: float = 0.0

    @staticmethod
    def of(sampling: Sampling, *, seed: int, choice: int, position: int) -> Draw:
        """Return the draw of one position of one choice."""
        greedy = sampling.temperature == 0.0
        return Draw(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            uniform=0.0 if greedy else uniform(seed, choice, position),
            min_p=sampling.min_p,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A token's natural-log probability and the most probable tokens with theirs."""

    logprob: float
    top: tuple[tuple[int, float], ...]


def fresh_seed() -> int:
    """Return a seed for a request that has none."""
    return secrets.randbits(63)


def uniform(seed: int, choice: int, position: int) -> float:
    """Return the number in [0, 1) of this position: counter-based, so any can be made alone.

    Source: Philox4x64-10 (Salmon et al. 2011), as NumPy implements it.
    """
    key = np.array([seed % 2**64, choice], dtype=np.uint64)
    counter = np.array([position, 0, 0, 0], dtype=np.uint64)
    raw = int(np.random.Philox(key=key, counter=counter).random_raw())
    return (raw >> 11) * 2.0**-53


def finite_rows(logits_RV: Tensor) -> list[bool]:
    """Say of each row whether a token can be chosen: no NaN, no +inf, not all -inf."""
    finite: list[bool] = logits_RV.amax(-1).isfinite().tolist()
    return finite


def choose(logits_RV: Tensor, draws: Sequence[Draw]) -> list[int]:
    """Choose one token a row.

    The order is that of transformers' processors: temperature, then top-k, then top-p of what
    top-k left, then min-p.

    Args:
        logits_RV: In float32; rows as ``finite_rows`` wants them.
        draws: One for each row.

    Returns:
        Token ids, one a row.
    """
    # numpy's takes a twentieth of the time of torch's on a CPU.
    on_cpu = logits_RV.device.type == "cpu"
    best_R = logits_RV.numpy(force=True).argmax(-1) if on_cpu else logits_RV.argmax(-1)
    chosen: list[int] = best_R.tolist()
    sampled = [i for i, draw in enumerate(draws) if draw.temperature > 0.0]
    narrow = [i for i in sampled if draws[i].top_k > 0 or draws[i].top_p < 1.0]
    wide = sorted(set(sampled) - set(narrow))
    if wide:
        weights_RV = _weights(logits_RV[wide], [draws[i] for i in wide])
        weights_RV = _probable(weights_RV, [draws[i] for i in wide])
        for i, token in zip(wide, _invert(weights_RV, [draws[i] for i in wide]), strict=True):
            chosen[i] = token
    for i in narrow:
        chosen[i] = _choose_narrow(logits_RV[i : i + 1], draws[i])
    return chosen


def score(logits_RV: Tensor, tokens: Sequence[int], num_top: int) -> list[Score]:
    """Return the log probability of one token a row, and of the ``num_top`` most probable ones."""
    logprobs_RV = torch.log_softmax(logits_RV, -1)
    own = logprobs_RV.gather(1, put(tokens, logprobs_RV.device)[:, None])[:, 0].tolist()
    best, ids = logprobs_RV.topk(num_top, -1)
    return [
        Score(logprob=logprob, top=tuple(zip(row_ids, row_best, strict=True)))
        for logprob, row_ids, row_best in zip(own, ids.tolist(), best.tolist(), strict=True)
    ]


def _choose_narrow(logits_1V: Tensor, draw: Draw) -> int:
    """Choose under top-k or top-p, sorting no more of the vocabulary than they reach."""
    vocabulary = logits_1V.shape[1]
    weights_1V = _weights(logits_1V, [draw])
    num_candidates = min(draw.top_k or _FEW_CANDIDATES, vocabulary)
    weights_1C, ids_1C = weights_1V.topk(num_candidates, -1)
    total = weights_1C.sum() if draw.top_k else weights_1V.sum()
    if not draw.top_k and weights_1C.sum() < draw.top_p * total:
        weights_1C, ids_1C = weights_1V.sort(dim=-1, descending=True, stable=True)
    # A candidate stays while the mass of those before it is under top_p, so one always does.
    before_1C = weights_1C.cumsum(-1) - weights_1C
    kept_1C = torch.where(before_1C < draw.top_p * total, weights_1C, 0.0)
    kept_1C = _probable(kept_1C, [draw])
    return int(ids_1C[0, _invert(kept_1C, [draw])[0]])


def _weights(logits_RV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Return unnormalised probabilities in float64, at most 1, after the temperature."""
    temperature_R1 = _column([draw.temperature for draw in draws], logits_RV)
    logits_RV = logits_RV.double()
    return ((logits_RV - logits_RV.amax(-1, keepdim=True)) / temperature_R1).exp()


def _probable(weights_RV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Drop what is less probable than min-p of the most probable token, whose weight is 1."""
    if not any(draw.min_p for draw in draws):
        return weights_RV
    min_p_R1 = _column([draw.min_p for draw in draws], weights_RV)
    return torch.where(weights_RV >= min_p_R1, weights_RV, 0.0)


def _invert(weights_RV: Tensor, draws: Sequence[Draw]) -> list[int]:
    """Return, for each row, the index at which the cumulative weight passes the uniform number."""
    cumulative_RV = weights_RV.cumsum(-1)
    uniform_R1 = _column([draw.uniform for draw in draws], cumulative_RV)
    targets_R1 = uniform_R1 * cumulative_RV[:, -1:]
    indices = torch.searchsorted(cumulative_RV, targets_R1, right=True)[:, 0]
    return indices.tolist()  # type: ignore[no-any-return]


def _column(values_R: Sequence[float], beside: Tensor) -> Tensor:
    """Return numbers, one for each row of ``beside``, [R, 1] in float64."""
    return put(values_R, beside.device, torch.float64)[:, None]
