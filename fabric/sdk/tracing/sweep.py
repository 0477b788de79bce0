"""Sweeps: one run for every combination of some axes' entries, and their saves as one array."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from fabric.sdk.tracing.lines import refuse

if TYPE_CHECKING:
    from fabric.sdk.arrays import Array
    from fabric.sdk.tracing.run import Prompt, TracedRun
    from fabric.sdk.tracing.session import Session


@dataclass(frozen=True, eq=False)
class NamedArray:
    """An array whose first axes have names and entries.

    Args:
        array: [*(an axis each), ...].
        axes: The entries of each named axis.
    """

    array: Array
    axes: Mapping[str, tuple[Any, ...]]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole array."""
        return tuple(self.array.shape)

    def at(self, **entries: object) -> NamedArray | Array:
        """Return the part where axes have these entries: ``grid.at(layer=3)``."""
        index = tuple(
            self.axes[name].index(entries[name]) if name in entries else slice(None)
            for name in self.axes
        )
        rest = {name: values for name, values in self.axes.items() if name not in entries}
        return NamedArray(self.array[index], rest) if rest else self.array[index]

    def __array__(self, dtype: Any = None, copy: Any = None) -> Array:
        import numpy as np

        return np.array(self.array, dtype=dtype, copy=copy)

    def __getitem__(self, index: Any) -> Array:
        part: Array = self.array[index]
        return part


class Grid:
    """The runs of a sweep.

    ::

        grid = s.sweep("corrupt prompt", layer=range(30), pos=range(10))
        for run, layer, pos in grid:
            run.layers[layer].out[pos] = clean.layers[layer].out[pos]
            run.logits[-1, [5, 7]].save("logits")
        ...
        grid["logits"]          # a NamedArray, [layer, pos, 2]

    Args:
        session: What the runs belong to.
        prompt: Of every run.
        id: The first part of the runs' names.
        axes: Entries by the axis' name.
    """

    def __init__(
        self, session: Session, prompt: Prompt, id: str, axes: Mapping[str, Sequence[Any]]
    ) -> None:
        self.axes = {name: tuple(entries) for name, entries in axes.items()}
        if empty := [name for name, entries in self.axes.items() if not entries]:
            raise refuse(f"The axis {empty[0]!r} of the sweep has no entries.")
        if not self.axes:
            raise refuse("A sweep has axes: s.sweep(prompt, layer=range(12), pos=[0, 3]).")
        self._runs: list[TracedRun] = [
            session.run(prompt, id=f"{id}{number}")
            for number, _ in enumerate(product(*self.axes.values()))
        ]

    def __iter__(self) -> Iterator[Any]:
        for run, entries in zip(self._runs, product(*self.axes.values()), strict=True):
            yield run, *entries

    def __len__(self) -> int:
        return len(self._runs)

    def __getitem__(self, save: str) -> NamedArray:
        import numpy as np

        stacked = np.stack([run.result[save] for run in self._runs])
        sizes = tuple(len(entries) for entries in self.axes.values())
        return NamedArray(stacked.reshape(*sizes, *stacked.shape[1:]), self.axes)
