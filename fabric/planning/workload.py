"""What a model is asked to hold and to do: dtype, rows, context."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fabric.errors import RequestInvalid

CACHE_BLOCK_TOKENS = 16
"""A row's cache is given out in blocks of so many tokens."""

LARGEST_COUNT = 10**9
"""No number of rows, tokens or devices is larger; what is, is a mistake."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """How numbers are kept.

    Args:
        name: The dtype, as it is asked for.
        matrix_bits: Bits of one parameter of a quantised matrix, its scales included.
        value_bytes: Of everything else: embeddings, small parameters, activations, the KV cache.
        multiplied_as: The dtype in which matrices are multiplied.
    """

    name: str
    matrix_bits: float
    value_bytes: int
    multiplied_as: str

    def weight_bytes(self, *, matrices: int, values: int) -> int:
        """Return what parameters take: of quantised matrices, and of everything else."""
        return math.ceil(matrices * self.matrix_bits / 8) + values * self.value_bytes


_LISTED = (
    Precision(name="bf16", matrix_bits=16, value_bytes=2, multiplied_as="bf16"),
    Precision(name="fp16", matrix_bits=16, value_bytes=2, multiplied_as="fp16"),
    Precision(name="fp32", matrix_bits=32, value_bytes=4, multiplied_as="fp32"),
    # Weight-only: a scale of 16 bits for every 128 numbers, with int4 a zero point of 16 bits too.
    Precision(name="int8", matrix_bits=8 + 16 / 128, value_bytes=2, multiplied_as="bf16"),
    Precision(name="int4", matrix_bits=4 + 32 / 128, value_bytes=2, multiplied_as="bf16"),
)

PRECISIONS: Mapping[str, Precision] = {precision.name: precision for precision in _LISTED}


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What an instance should be able to do at once.

    Args:
        dtype: bf16, fp16, fp32, int8 or int4.
        context_tokens: The longest row, prompt and output together.
        batch: Rows of that length that run at once.
        step_tokens: The most prompt tokens in one step.

    Raises:
        RequestInvalid: The dtype is not known, or a number is not a positive whole one.
    """

    dtype: str
    context_tokens: int
    batch: int
    step_tokens: int

    def __post_init__(self) -> None:
        if self.dtype not in PRECISIONS:
            raise RequestInvalid(
                param="dtype", value=self.dtype, reason=f"it must be one of {', '.join(PRECISIONS)}"
            )
        for param in ("context_tokens", "batch", "step_tokens"):
            check_count(param, getattr(self, param))

    @property
    def precision(self) -> Precision:
        """What the dtype stands for."""
        return PRECISIONS[self.dtype]

    @property
    def cache_tokens(self) -> int:
        """Tokens that the KV cache has to hold, in whole blocks."""
        blocks = -(-self.context_tokens // CACHE_BLOCK_TOKENS)
        return self.batch * blocks * CACHE_BLOCK_TOKENS


def check_count(param: str, value: object) -> None:
    """Refuse what does not count anything.

    Raises:
        RequestInvalid: The value is not a whole number from 1 to 10^9.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST_COUNT:
        raise RequestInvalid(
            param=param, value=value, reason=f"it must be a whole number from 1 to {LARGEST_COUNT}"
        )
