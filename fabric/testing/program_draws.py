"""How a run of a program draws its tokens, written out from the definitions.

It shares no code with the engine's sampler, which takes the same generator from NumPy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fabric.messages.program import Generate

_WORD = 2**64
_FACTORS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_STEPS = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)

Block = tuple[int, int, int, int]
"""Four words of 64 bits."""


def draw_token(logits: Tensor, gen: Generate, step: int) -> int:
    """Return the likeliest token at temperature 0, else the one at the step's number.

    The number of a step is in [0, 1): the first 53 bits of the first word of the block
    ``step + 1`` under the key (seed, 0). The token is the first, in order of ids, with which the
    sum of the probabilities exceeds it.

    Args:
        logits: [vocabulary].
        gen: Temperature and seed.
        step: From 0.
    """
    if not gen.temperature:
        return int(logits.argmax())
    logits = logits.double()
    upto = torch.softmax((logits - logits.max()) / gen.temperature, 0).cumsum(0)
    number = (philox((gen.seed, 0), (step + 1, 0, 0, 0))[0] >> 11) * 2.0**-53
    return min(int((upto <= number).sum()), len(logits) - 1)


def philox(key: tuple[int, int], counter: Block) -> Block:
    """Return a block of Philox4x64-10.

    Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011.
    """
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(10):
        high0, low0 = divmod(_FACTORS[0] * c0, _WORD)
        high1, low1 = divmod(_FACTORS[1] * c2, _WORD)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _STEPS[0]) % _WORD, (k1 + _STEPS[1]) % _WORD
    return c0, c1, c2, c3
