"""Changes logits as requests ask: biases, penalties, and tokens that a grammar forbids.

Only rows that ask for it are touched; the others stay as they are, bit by bit.

Shapes: R rows, V vocabulary, A adjusted tokens of all rows together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fabric.engine.device import put
from fabric.messages import Sampling

Changes = list[tuple[int, NDArray[np.int64], NDArray[np.float32]]]
"""(row, token ids, a value for each)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Adjustment:
    """What is to be changed in one row; ``allowed`` says of each token whether it may come."""

    sampling: Sampling
    prompt: Sequence[int]
    generated: Sequence[int]
    allowed: NDArray[np.bool_] | None = None


def changes_logits(wanted: Sampling) -> bool:
    """Say whether a request asks for biases or penalties."""
    penalties = wanted.presence_penalty or wanted.frequency_penalty
    return bool(wanted.logit_bias or penalties) or wanted.repetition_penalty != 1.0


def adjust(logits_RV: Tensor, adjustments: Mapping[int, Adjustment]) -> Tensor:
    """Return the logits to choose from: bias, then penalties, then what is allowed.

    A bias is added. ``repetition_penalty`` divides the positive logits of every token of prompt and
    answer and multiplies the negative ones. From the logit of a token that the answer holds
    ``c`` times, ``presence_penalty + c * frequency_penalty`` is subtracted.

    Args:
        logits_RV: Stays as it is.
        adjustments: By row.

    Source: transformers' ``RepetitionPenaltyLogitsProcessor`` (Keskar et al. 2019); OpenAI's
    API reference for the other penalties and ``logit_bias``.
    """
    if not adjustments:
        return logits_RV
    adjusted_RV = logits_RV.clone()
    _add(adjusted_RV, [_biases(row, asked) for row, asked in adjustments.items()])
    _repeat(adjusted_RV, [_repeated(row, asked) for row, asked in adjustments.items()])
    _add(adjusted_RV, [_penalties(row, asked) for row, asked in adjustments.items()])
    bound = {i: asked.allowed for i, asked in adjustments.items() if asked.allowed is not None}
    if bound:
        rows_R = put(list(bound), logits_RV.device)
        allowed_RV = put(np.stack(list(bound.values())), logits_RV.device)
        adjusted_RV[rows_R] = adjusted_RV[rows_R].masked_fill(~allowed_RV, -torch.inf)
    return adjusted_RV


def _biases(row: int, asked: Adjustment) -> tuple[int, NDArray[np.int64], NDArray[np.float32]]:
    bias = asked.sampling.logit_bias
    return row, np.array([*bias], dtype=np.int64), np.array([*bias.values()], dtype=np.float32)


def _repeated(row: int, asked: Adjustment) -> tuple[int, NDArray[np.int64], NDArray[np.float32]]:
    penalty = asked.sampling.repetition_penalty
    seen = [] if penalty == 1.0 else [*asked.prompt, *asked.generated]
    tokens_A = np.unique(np.array(seen, dtype=np.int64))
    return row, tokens_A, np.full(len(tokens_A), penalty, dtype=np.float32)


def _penalties(row: int, asked: Adjustment) -> tuple[int, NDArray[np.int64], NDArray[np.float32]]:
    presence, frequency = asked.sampling.presence_penalty, asked.sampling.frequency_penalty
    generated = asked.generated if presence or frequency else []
    tokens_A, counts_A = np.unique(np.array(generated, dtype=np.int64), return_counts=True)
    return row, tokens_A, -(presence + frequency * counts_A).astype(np.float32)


def _add(logits_RV: Tensor, changes: Changes) -> None:
    rows_A, tokens_A, values_A = _flat(changes, logits_RV.device)
    if len(tokens_A):
        logits_RV[rows_A, tokens_A] += values_A


def _repeat(logits_RV: Tensor, changes: Changes) -> None:
    rows_A, tokens_A, values_A = _flat(changes, logits_RV.device)
    if len(tokens_A):
        old_A = logits_RV[rows_A, tokens_A]
        logits_RV[rows_A, tokens_A] = torch.where(old_A < 0, old_A * values_A, old_A / values_A)


def _flat(changes: Changes, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows, token ids and values, one of each for every pair of row and token."""
    rows_A = np.concatenate([np.full(len(tokens), row) for row, tokens, _ in changes])
    tokens_A = np.concatenate([tokens for _, tokens, _ in changes])
    values_A = np.concatenate([values for *_, values in changes])
    rows, tokens, values = (put(array, device) for array in (rows_A, tokens_A, values_A))
    return rows, tokens, values
