"""What the runs of a batch add and save in every step of decoding, laid out once for all of them.

Shapes: N tokens of a step, F features of a point, R tokens that something is added to.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from fabric.engine.programs.points import Tap, flat
from fabric.engine.programs.steady import Steady
from fabric.engine.touches import Add, Keep, Room, Touch, Touches


class Composition:
    """Runs that do the same in all steps, each with one token, for as long as they are the same.

    Args:
        runs: By their token in the ragged row.
    """

    def __init__(self, runs: Mapping[int, Steady]) -> None:
        self.runs = runs
        self.rooms = {
            row: Room(torch.empty(steady.num_kept, dtype=steady.dtype))
            for row, steady in runs.items()
            if steady.saves
        }
        """Where runs save, each in a room of its own."""
        self._at: dict[str, list[Touch]] = {}
        for row, steady in runs.items():
            for point, vector in steady.adds.items():
                self._at.setdefault(point, []).append(Add(row=row, vector=vector))
            for point, kept in steady.saves.items():
                touch = Keep(row=row, room=self.rooms[row], span=kept.span)
                self._at.setdefault(point, []).append(touch)
        self._by_layer: dict[int | None, list[str]] = {}
        for point in self._at:
            self._by_layer.setdefault(_layer_of(point), []).append(point)
        self._adds: dict[str, tuple[Tensor, Tensor]] = {}

    @cached_property
    def touches(self) -> dict[int, Touches]:
        """By layer, what happens in it, for the kernels that run layers whole."""
        return {
            layer: Touches({point.split(".", 2)[2]: self._at[point] for point in points})
            for layer, points in self._by_layer.items()
            if layer is not None
        }

    def outside(self, whole: Collection[int]) -> list[str]:
        """Return the points at which something happens, but for those in these layers."""
        return [
            point
            for layer, points in self._by_layer.items()
            if layer not in whole
            for point in points
        ]

    def serve(self, point: str, tap: Tap, x: Tensor) -> Tensor | None:
        """Do what happens at a point of a module's tensor; return another one where it was changed
        and others do not hold it."""
        x_NF = flat(x)
        for touch in self._at[point]:
            if isinstance(touch, Keep):
                own = tap.view(x_NF[touch.row : touch.row + 1])
                touch.room.numbers[touch.span].copy_(own.flatten())
        if point not in self._adds:
            self._adds[point] = _added(self._at[point])
        rows_R, vectors_RF = self._adds[point]
        if not len(rows_R):
            return None
        result = x if tap.shared else x.clone()
        flat(result).index_add_(0, rows_R, vectors_RF)
        return None if tap.shared else result


def _layer_of(point: str) -> int | None:
    """Return the layer that a point is in, if any."""
    return int(point.split(".", 2)[1]) if point.startswith("layers.") else None


def _added(touches: Sequence[Touch]) -> tuple[Tensor, Tensor]:
    """Return the rows that something is added to, [R], and what, [R, F]."""
    added = {touch.row: touch.vector for touch in touches if isinstance(touch, Add)}
    vectors = torch.stack(list(added.values())) if added else torch.empty(0)
    return torch.tensor(list(added), dtype=torch.long), vectors
