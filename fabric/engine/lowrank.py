"""Low-rank changes of linear layers, each for some tokens of a step only.

A layer that computes ``y = x W^T`` gives ``y + scale (x A^T) B^T`` for the tokens of a ``Delta``
that changes it, whatever the layer is made of (``nn.Linear``, GPT-2's ``Conv1D``, packed weights).
The other tokens keep their outputs bit by bit. Hooks on a layer see its changed output.

Shapes: N tokens of the step, K inputs and O outputs of a layer, R rank, T changed tokens,
L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from fabric.engine.native import Native, load_native
from fabric.errors import LowRankInvalid

Table = NDArray[np.int64]

_LONG = 24
"""Consecutive tokens from which on torch multiplies matrices faster than our kernel rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSize:
    """The inputs and outputs of one layer."""

    num_inputs: int
    num_outputs: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Factors:
    """What is added to one weight [O, K]: ``scale * up_OR @ down_RK``."""

    down_RK: Tensor
    up_OR: Tensor
    scale: float = 1.0


class Delta:
    """Factors of some layers, ready to run in one model; made by ``LowRankLayers.place``."""

    def __init__(self, placed: Mapping[int, tuple[Tensor, Tensor]], num_layers: int) -> None:
        self.placed = placed
        """By the layer's index: ``down`` [R, K], and the scaled ``up`` [R, O]."""
        self.num_bytes = sum(x.nbytes for factors in placed.values() for x in factors)
        self.table = np.zeros((num_layers, 3), dtype=np.int64)
        """Addresses and ranks, for the kernel; rank 0 where a layer is not changed."""
        for layer, (down, up) in placed.items():
            self.table[layer] = down.data_ptr(), up.data_ptr(), len(down)


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """The tokens ``start`` to ``stop`` of a step, for which a delta counts.

    Spans may overlap: then all their deltas count, in the order of the spans.
    """

    start: int
    stop: int
    delta: Delta


class LowRankLayers:
    """The linear layers of one model that deltas can change.

    The layers' ``forward`` is wrapped at the first step that has a delta, on this instance of the
    model; a model that never has one runs as it was.

    Args:
        model: With its layers in their final form (packed).
        sizes: Of the layers that are given all tokens of a step as [1, N, K], once a pass, by
            their names in the model; see ``observe_linears``.
    """

    def __init__(self, model: nn.Module, sizes: Mapping[str, LayerSize]) -> None:
        self.sizes = dict(sizes)
        self._indices = {name: i for i, name in enumerate(sizes)}
        self._modules: list[nn.Module] = [model.get_submodule(name) for name in sizes]
        self._like = next(model.parameters())
        self.dtype = self._like.dtype
        self.indices = {module: i for i, module in enumerate(self._modules)}
        """Their places in a delta's table."""
        self._wrapped = False
        self._step: _Step | None = None

    def place(self, factors: Mapping[str, Factors]) -> Delta:
        """Return a delta of these layers: checked, scaled, in the model's dtype and on its device.

        Raises:
            LowRankInvalid: The model has no such layer, or a shape is not the layer's.
        """
        placed: dict[int, tuple[Tensor, Tensor]] = {}
        for name, layer in factors.items():
            size = self.sizes.get(name)
            if size is None:
                raise LowRankInvalid(
                    layer=name, reason="the model has no linear layer of this name in its blocks"
                )
            rank = layer.down_RK.shape[0]
            expected = ((rank, size.num_inputs), (size.num_outputs, rank))
            found = (tuple(layer.down_RK.shape), tuple(layer.up_OR.shape))
            if found != expected or rank == 0:
                raise LowRankInvalid(
                    layer=name,
                    reason=f"its factors have the shapes {found[0]} and {found[1]}; the layer takes"
                    f" (r, {size.num_inputs}) and ({size.num_outputs}, r)",
                )
            up_RO = (layer.up_OR.float() * layer.scale).T
            placed[self._indices[name]] = (self._move(layer.down_RK), self._move(up_RO))
        return Delta(placed, len(self.sizes))

    @contextmanager
    def applied(self, spans: Sequence[Span]) -> Iterator[Sequence[Changes] | None]:
        """Run what is inside with the deltas counting for their tokens, and no others.

        Gives them as the kernels take them, for layers whose modules are not called; ``None`` where
        some are not for the kernels.
        """
        before = self._step
        if spans:
            self._wrap()
        self._step = _Step(spans, self._get_native()) if spans else None
        try:
            yield () if self._step is None else self._step.changes
        finally:
            self._step = before

    def _get_native(self) -> Native | None:
        native = load_native()
        return native if native is not None and native.takes(self._like) else None

    def _move(self, x: Tensor) -> Tensor:
        return x.detach().to(self._like).contiguous()

    def _wrap(self) -> None:
        if self._wrapped:
            return
        for layer, module in enumerate(self._modules):
            # Not a hook: hooked siblings of a packed weight are multiplied one by one.
            module.forward = partial(self._forward, layer, module.forward)
        self._wrapped = True

    def _forward(self, layer: int, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        y = forward(x)
        return y if self._step is None else self._step.add(layer, x, y)


class _Step:
    """The spans of one step, laid out for all layers."""

    def __init__(self, spans: Sequence[Span], native: Native | None) -> None:
        self._native = native
        self._long = [s for s in spans if native is None or s.stop - s.start >= _LONG]
        short = [s for s in spans if native is not None and s.stop - s.start < _LONG]
        self._rounds = [Changes(tokens) for tokens in _distinct(short)]

    @property
    def changes(self) -> Sequence[Changes] | None:
        """All of it, if the kernels can do it."""
        return None if self._long else self._rounds

    def add(self, layer: int, x_1NK: Tensor, y_1NO: Tensor) -> Tensor:
        """Return the layer's output with what the deltas add to it."""
        if y_1NO.requires_grad:
            return self._add_recorded(layer, x_1NK, y_1NO)
        for span in self._long:
            _add(span, layer, x_1NK[0], y_1NO[0, span.start : span.stop])
        if self._native is not None:
            for round_ in self._rounds:
                round_.add(self._native, layer, x_1NK, y_1NO)
        return y_1NO

    def _add_recorded(self, layer: int, x_1NK: Tensor, y_1NO: Tensor) -> Tensor:
        """As ``add``, but out of place and by torch alone, so that gradients flow."""
        y_NO = y_1NO[0].clone()
        spans = [*self._long, *(span for round_ in self._rounds for span in round_.spans)]
        for span in spans:
            _add(span, layer, x_1NK[0], y_NO[span.start : span.stop])
        return y_NO[None]


def _add(span: Span, layer: int, x_NK: Tensor, y_nO: Tensor) -> None:
    """Add a delta to the outputs of its own tokens, in place."""
    if (factors := span.delta.placed.get(layer)) is not None:
        down_RK, up_RO = factors
        y_nO.addmm_(x_NK[span.start : span.stop] @ down_RK.T, up_RO)


class Changes:
    """Tokens that are all different, with the delta of each: what the kernel takes at once."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self.spans = spans
        self._tokens_T = np.concatenate([np.arange(s.start, s.stop) for s in spans])
        tables = [s.delta.table for s in spans for _ in range(s.start, s.stop)]
        self._table_LT3: Table = np.stack(tables, axis=1)
        self._ranks_L: Table = self._table_LT3[:, :, 2].max(axis=1)
        self._changed: list[int] = self._ranks_L.tolist()
        self._layer_bytes = self._table_LT3.strides[0]
        self.num_tokens = len(tables)
        # Addresses, asked once: numpy takes longer to find them than the kernel to add a row.
        self.tokens, self.table = self._tokens_T.ctypes.data, self._table_LT3.ctypes.data
        self.ranks = self._ranks_L.ctypes.data

    def add(self, native: Native, layer: int, x_1NK: Tensor, y_1NO: Tensor) -> None:
        """Add what the deltas add to a layer's outputs."""
        if self._changed[layer]:
            table = self.table + layer * self._layer_bytes
            native.add_lowrank(x_1NK, y_1NO, self.tokens, table, self.num_tokens)


def _distinct(spans: Sequence[Span]) -> list[list[Span]]:
    """Return the spans in as few lists as they fit into without overlapping within one."""
    lists: list[list[Span]] = []
    taken: list[set[int]] = []
    for span in spans:
        tokens = set(range(span.start, span.stop))
        # After the last list that has one of its tokens: sums keep the order of the spans.
        at = max((i + 1 for i, others in enumerate(taken) if others & tokens), default=0)
        if at == len(lists):
            lists.append([])
            taken.append(set())
        lists[at].append(span)
        taken[at] |= tokens
    return lists
