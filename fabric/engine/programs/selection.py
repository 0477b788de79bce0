"""Which positions a node's selector takes: of a step, of a prompt, of a whole run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fabric.engine.programs.cells import WHOLE, Place
from fabric.engine.programs.values import Positions
from fabric.messages import nodes as ops

Selecting = ops.Read | ops.Write | ops.Project | ops.Clamp | ops.Skip | ops.Grad


@dataclass(frozen=True, slots=True)
class Reach:
    """The positions of one run: ``num_prompt`` in step 0, then one a step."""

    num_prompt: int
    num_steps: int

    def step_of(self, position: int) -> int:
        """Return the step that runs a position."""
        return max(0, position - self.num_prompt + 1)

    def positions(self, node: Selecting, start: int, count: int) -> Sequence[int]:
        """Return the positions of a chunk at which a node acts, in the order it names them."""
        sel, end = node.sel, start + count
        step = self.step_of(end - 1)
        if sel.phase != "all" and (sel.phase == "prefill") != (step == 0):
            return ()
        if sel.steps is not None and not sel.steps[0] <= step < sel.steps[1]:
            return ()
        completes = step > 0 or end == self.num_prompt
        late = getattr(node, "at", None) == "sample"
        if sel.pos == "last" or (late and sel.pos == "all"):
            return (end - 1,) if completes else ()
        if sel.pos == "all":
            return range(start, end)
        return [p for p in self._given(sel) if start <= p < end]

    def place(
        self, node: Selecting, span: tuple[int, int], num_rows: int, base: int
    ) -> tuple[Place, Positions]:
        """Return the part of a cell that a node takes, and its positions.

        Args:
            node: That acts there.
            span: The chunk's first position and its length.
            num_rows: Of the cell: the last ones of the chunk.
            base: The position of the first of them.
        """
        sel = node.sel
        if num_rows == 1 == span[1] and sel.heads is None and sel.dims is None:
            return WHOLE, (base,)
        positions = self.positions(node, *span)
        at = tuple(positions[-num_rows:] if isinstance(positions, range) else positions)
        whole = len(at) == num_rows and at == tuple(range(base, base + num_rows))
        rows = None if whole else _index([p - base for p in at])
        heads = None if sel.heads is None else _index(sel.heads)
        dims = None if sel.dims is None else _index(sel.dims)
        return Place(rows, heads, dims), at

    def first_of(self, sel: ops.Selector, *, decoding: bool) -> int | None:
        """Return the first position that a selector takes, of the prompt or of the whole run."""
        begin, end = sel.steps or (0, self.num_steps)
        steps = range(begin, min(end, self.num_steps))
        of_prompt = sel.phase != "decode" and 0 in steps
        later = steps[steps.start == 0 :] if sel.phase != "prefill" and decoding else ()
        firsts: list[int] = []
        if sel.pos == "all" or sel.pos == "last":
            firsts += [0 if sel.pos == "all" else self.num_prompt - 1] if of_prompt else []
            firsts += [self.num_prompt + later[0] - 1] if later else []
        else:
            firsts = [
                p for p in self._given(sel) if (of_prompt if p < self.num_prompt else bool(later))
            ]
        return min(firsts, default=None)

    def _given(self, sel: ops.Selector) -> list[int]:
        assert isinstance(sel.pos, tuple), "spans are positions by now"
        return [p + self.num_prompt if p < 0 else p for p in sel.pos]


def _index(numbers: Sequence[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.long)
