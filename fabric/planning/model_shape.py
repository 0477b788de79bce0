"""The shape of a causal language model: its parameters, counted, and what a token costs.

Parameters come in four kinds, because ranks and dtypes treat them differently:

- *divided*: matrices of which each rank of a tensor group holds an equal part;
- *whole*: matrices that every rank of the group holds (the down-projections of latent attention);
- *small*: norms, biases and routers, which are never quantised; every rank is taken to hold them
  all (of some biases it needs a part only, a difference of kilobytes);
- *experts*: matrices of which a token uses some.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """One layer.

    Args:
        divided: Parameters of the matrices that a tensor group divides.
        whole: Parameters of the matrices that it does not.
        small: Parameters of norms, biases and routers.
        num_experts: Routed experts.
        num_chosen: How many of them one token uses.
        expert: Parameters of one routed expert.
        cache_values: Numbers the KV cache keeps of one token.
        cache_divided: Whether a tensor group divides those by its heads.
        score_values: Multiply-adds of the attention for one token and one earlier token.
        width: Numbers of one token that are alive at the layer's widest place.
    """

    divided: int
    small: int
    cache_values: int
    score_values: int
    width: int
    whole: int = 0
    num_experts: int = 0
    num_chosen: int = 0
    expert: int = 0
    cache_divided: bool = True

    @property
    def experts(self) -> int:
        """Parameters of all routed experts."""
        return self.num_experts * self.expert

    @property
    def parameters(self) -> int:
        """All of the layer's parameters."""
        return self.divided + self.whole + self.small + self.experts

    @property
    def active_matrices(self) -> int:
        """Parameters of matrices that one token is multiplied with."""
        return self.divided + self.whole + self.num_chosen * self.expert

    def touched_experts(self, num_tokens: int) -> float:
        """Return how many experts a step over so many tokens uses, if routing is uniform."""
        if not self.num_experts:
            return 0.0
        missed = (1 - self.num_chosen / self.num_experts) ** num_tokens
        return self.num_experts * (1 - missed)


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A whole model.

    Args:
        name: What it is called.
        family: transformers' ``model_type``.
        layers: Its layers, in order.
        hidden: Numbers of a token between layers.
        vocabulary: Tokens it knows.
        is_tied: Whether the output matrix is the embedding.
        positions: Parameters of learned positions.
        final_small: Parameters of the last norm.
        context_tokens: The longest row it was made for.
        divisors: What a tensor group's size has to divide: heads and widths.
        expert_width: The inner width of a routed expert; 0 without experts.
        expanded_cache_values: What the cache of one token and layer takes in an engine that keeps
            the keys and values themselves where latent attention could keep less; else 0.
        notes: What the count leaves out or takes for granted.
    """

    name: str
    family: str
    layers: tuple[LayerShape, ...]
    hidden: int
    vocabulary: int
    is_tied: bool
    final_small: int
    context_tokens: int
    divisors: tuple[int, ...]
    positions: int = 0
    expert_width: int = 0
    expanded_cache_values: int = 0
    notes: tuple[str, ...] = ()

    @property
    def embedding(self) -> int:
        """Parameters of the embedding."""
        return self.vocabulary * self.hidden

    @cached_property
    def parameters(self) -> int:
        """All parameters; tied ones count once."""
        ends = self.embedding * (1 if self.is_tied else 2) + self.positions + self.final_small
        return ends + sum(layer.parameters for layer in self.layers)

    @cached_property
    def active_parameters(self) -> int:
        """Parameters without the experts that one token does not use."""
        unused = ((layer.num_experts - layer.num_chosen) * layer.expert for layer in self.layers)
        return self.parameters - sum(unused)

    @property
    def num_experts(self) -> int:
        """The most routed experts in a layer."""
        return max(layer.num_experts for layer in self.layers)

    def tensor_degrees(self, limit: int) -> list[int]:
        """Return the sizes a tensor group may have, at most ``limit``, ascending."""
        common = math.gcd(*self.divisors)
        small = [degree for degree in range(1, math.isqrt(common) + 1) if common % degree == 0]
        degrees = sorted({*small, *(common // degree for degree in small)})
        return [d for d in degrees if d <= limit and self._divides_experts(d)]

    def _divides_experts(self, degree: int) -> bool:
        return all(
            not layer.num_experts
            or layer.num_experts % degree == 0
            or self.expert_width % degree == 0
            for layer in self.layers
        )
