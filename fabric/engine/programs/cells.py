"""One run's part of a point in a step: what is read there, and where writes go.

Shapes: n tokens of the run in this step, H heads, D head size, O hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Place:
    """Which part of a cell a selector takes: rows (tokens), heads and dims; ``None`` takes all."""

    rows: Tensor | None
    heads: Tensor | None
    dims: Tensor | None

    @property
    def whole(self) -> bool:
        """Whether it takes everything."""
        return self.rows is None and self.heads is None and self.dims is None


WHOLE = Place(None, None, None)


class Cell(Protocol):
    """A point of one run in one step."""

    num_rows: int
    """Tokens there."""

    def take(self, place: Place) -> Tensor:
        """Return a copy of a part, [T, ...]."""

    def put(self, place: Place, x: Tensor) -> None:
        """Replace a part; what others hold of the step stays as it is."""

    def mark(self) -> Tensor:
        """Return what stands here, as a tensor that gradients can be taken for."""


class TensorCell:
    """A cell over the run's rows of a tensor; ``changed`` is what takes their place."""

    def __init__(self, h: Tensor) -> None:
        self.num_rows = h.shape[0]
        self.changed: Tensor | None = None
        self._h = h

    def take(self, place: Place) -> Tensor:
        """Return a copy: kernels reuse buffers, and writes may follow."""
        h = self._h if self.changed is None else self.changed
        if place.whole:
            return h.clone()
        if place.rows is not None:
            h = h.index_select(0, place.rows)
        if place.heads is not None:
            h = h.index_select(1, place.heads)
        if place.dims is not None:
            h = h.index_select(-1, place.dims)
        return h

    def put(self, place: Place, x: Tensor) -> None:
        """Replace a part, in a copy of the rows."""
        if place.whole:
            self.changed = x
            return
        h = self._h.clone() if self.changed is None else self.changed.clone()
        axes = [place.rows, place.heads] if h.dim() > 2 else [place.rows]
        axes += [place.dims] if h.dim() > 1 else []
        grid = [
            torch.arange(size, device=h.device) if index is None else index
            for size, index in zip(h.shape, axes, strict=True)
        ]
        h[torch.meshgrid(*grid, indexing="ij")] = x
        self.changed = h

    def mark(self) -> Tensor:
        """Return what stands here, as a tensor that gradients can be taken for."""
        h = self._h if self.changed is None else self.changed
        self.changed = h.clone() if h.requires_grad else h.detach().clone().requires_grad_()
        return self.changed


class HeadsCell:
    """What each head adds to the output of attention, made only where it is asked for.

    Args:
        z_nHD: The heads' outputs.
        project: The output projection, [..., H·D] -> [..., O], its bias included.
    """

    def __init__(self, z_nHD: Tensor, project: Callable[[Tensor], Tensor]) -> None:
        self.num_rows = z_nHD.shape[0]
        self.delta_nO: Tensor | None = None
        """What writes add to the sum over heads."""
        self._z = z_nHD
        self._project = project
        self._known: dict[int, Tensor] = {}
        """By head, [n, O]."""

    def take(self, place: Place) -> Tensor:
        """Return contributions [T, heads, O (or dims)]."""
        taken = torch.stack(self._parts(place), 1)
        if place.rows is not None:
            taken = taken.index_select(0, place.rows)
        return taken if place.dims is None else taken.index_select(-1, place.dims)

    def put(self, place: Place, x: Tensor) -> None:
        """Let these contributions be others; their difference goes to the output."""
        before = zip(self._heads(place), self._parts(place), strict=True)
        for i, (head, before_nO) in enumerate(before):
            cell = TensorCell(before_nO)
            cell.put(Place(place.rows, None, place.dims), x[:, i])
            assert cell.changed is not None
            self._known[head] = cell.changed
            self._add(cell.changed - before_nO)

    def mark(self) -> Tensor:
        """Return zeros [n, H, O] that count as part of the contributions."""
        parts = self._parts(WHOLE)
        zeros_nHO = torch.stack(parts, 1).detach().mul(0.0).requires_grad_()
        for head, part_nO in enumerate(parts):
            self._known[head] = part_nO + zeros_nHO[:, head]
        self._add(zeros_nHO.sum(1))
        return zeros_nHO

    def _add(self, delta_nO: Tensor) -> None:
        self.delta_nO = delta_nO if self.delta_nO is None else self.delta_nO + delta_nO

    def _heads(self, place: Place) -> list[int]:
        return list(range(self._z.shape[1])) if place.heads is None else place.heads.tolist()

    def _parts(self, place: Place) -> list[Tensor]:
        heads = self._heads(place)
        missing = [head for head in heads if head not in self._known]
        if missing:
            # Through the projection itself: its weight may be packed.
            alone_XnHD = torch.zeros(len(missing) + 1, *self._z.shape).to(self._z)
            for i, head in enumerate(missing):
                alone_XnHD[i, :, head] = self._z[:, head]
            made_XnO = self._project(alone_XnHD.flatten(2))
            for i, head in enumerate(missing):
                self._known[head] = made_XnO[i] - made_XnO[-1]
        return [self._known[head] for head in heads]
