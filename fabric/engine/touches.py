"""What happens to single tokens inside a layer, as its kernels do it on their way."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

TOUCHED = (
    "in", "attn.in", "attn.q", "attn.k", "attn.v", "attn.out", "mid", "mlp.in", "mlp.gate",
    "mlp.up", "mlp.act", "mlp.out", "out",
)  # fmt: skip
"""Points of a layer that touches can be at, as it comes by them; ``layer.c`` has the same list."""


class _Touch(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_long) for name in ("point", "row")),
        *((name, ctypes.c_void_p) for name in ("vector", "room")),
        ("offset", ctypes.c_long),
    )


class Room:
    """Where numbers are kept: other memory in every step, under one address that stays."""

    def __init__(self, numbers: Tensor) -> None:
        self._address = ctypes.c_void_p()
        self.at = ctypes.addressof(self._address)
        """The address of the numbers' address."""
        self.use(numbers)

    def use(self, numbers: Tensor) -> None:
        """Keep here from now on; one dimension, dense."""
        self.numbers = numbers
        self._address.value = numbers.data_ptr()


@dataclass(frozen=True, slots=True, kw_only=True)
class Add:
    """A vector is added to one token, ``row`` of the step's; of the point's dtype, dense."""

    row: int
    vector: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """One token's numbers are kept, in ``span`` of a room of the point's dtype."""

    row: int
    room: Room
    span: slice


Touch = Add | Keep


class Touches:
    """The touches of one layer, as the kernels read them.

    Args:
        at: By point; those that are not in ``TOUCHED`` are in no layer that runs whole.
    """

    def __init__(self, at: Mapping[str, Sequence[Touch]]) -> None:
        self._pointed_to = at
        ordered = [
            _c_touch(TOUCHED.index(point), touch)
            for point in TOUCHED
            for touch in at.get(point, ())
        ]
        self._c = (_Touch * (len(ordered) + 1))(*ordered, _Touch(point=len(TOUCHED)))
        self.address = ctypes.addressof(self._c)


def _c_touch(point: int, touch: Touch) -> _Touch:
    if isinstance(touch, Add):
        return _Touch(point=point, row=touch.row, vector=touch.vector.data_ptr())
    offset = touch.span.start * touch.room.numbers.itemsize
    return _Touch(point=point, row=touch.row, room=touch.room.at, offset=offset)
