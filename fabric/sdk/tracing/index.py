"""Python's indexes as selectors and slices of the wire."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from pydantic import ValidationError

from fabric.messages.nodes import Selector, Span
from fabric.sdk.tracing.lines import refuse

MAX_ENUMERATED = 4096
"""The longest range that is sent as the numbers it stands for."""

Pos: TypeAlias = Literal["all", "last"] | tuple[int, ...] | Span
Part: TypeAlias = int | tuple[int | None, int | None] | None


@dataclass(frozen=True, slots=True)
class Region:
    """Which part of a point is meant: what the selector says, then what is cut from that.

    Args:
        sel: The selector.
        cut: An index of the selection, which drops the axes that a number was given for.
    """

    sel: Selector
    cut: tuple[Part, ...] = ()

    @property
    def is_plain(self) -> bool:
        """Whether nothing was indexed yet."""
        return not self.cut and (self.sel.pos, self.sel.heads, self.sel.dims) == ("all", None, None)

    @property
    def dropped(self) -> tuple[int, ...]:
        """The axes a number was given for."""
        return tuple(axis for axis, part in enumerate(self.cut) if isinstance(part, int))

    @property
    def can_be_written(self) -> bool:
        """Whether the selector alone says what is meant, but for dropped axes."""
        return all(part is None or part == 0 for part in self.cut)


def select(region: Region, index: object, ndim: int) -> Region:
    """Return the part of a whole point that an index means.

    Axis 0 are positions, the last one the dimensions, and one between them the heads.

    Raises:
        TraceError: It is no such index.
    """
    parts = _spread(index, ndim)
    sel, cut = region.sel, list[Part]()
    for axis, part in enumerate(parts):
        name = "pos" if axis == 0 else "dims" if axis == ndim - 1 else "heads"
        if name == "pos":
            sel, rest = _positions(sel, part)
        else:
            sel, rest = _coordinates(sel, name, part)
        cut.append(rest)
    while cut and cut[-1] is None:
        cut.pop()
    return Region(sel, tuple(cut))


def slices(index: object, ndim: int | None) -> list[Part | list[int]]:
    """Return what an index of a value means, an axis each; a list takes those entries.

    Raises:
        TraceError: It is no such index.
    """
    made: list[Part | list[int]] = []
    for part in _spread(index, ndim):
        if isinstance(part, slice):
            if part.step not in (None, 1):
                raise refuse("A slice of a traced value has the step 1; list the entries instead.")
            ends = (_number(part.start), _number(part.stop))
            made.append(None if ends == (None, None) else ends)
        elif (numbers := _numbers(part)) is not None:
            made.append(numbers)
        else:
            made.append(_number(part))
    return made


def _spread(index: object, ndim: int | None) -> list[Any]:
    parts = list(index) if isinstance(index, tuple) else [index]
    if any(part is None for part in parts):
        raise refuse("A traced value gets a new axis by `.unsqueeze(axis)`, not by None.")
    dots = [at for at, part in enumerate(parts) if part is Ellipsis]
    if dots:
        if ndim is None or len(dots) > 1:
            raise refuse("How many axes `...` stands for is not known here; write them out.")
        at = dots[0]
        parts[at : at + 1] = [slice(None)] * (ndim - len(parts) + 1)
    if ndim is not None and len(parts) > ndim:
        raise refuse(f"There are {ndim} axes, and {len(parts)} are indexed.")
    return parts


def _positions(sel: Selector, part: Any) -> tuple[Selector, Part]:
    if part == "last" or isinstance(part, Span):
        return _with(sel, pos=part), 0 if part == "last" else None
    if isinstance(part, slice):
        begin, end = _number(part.start), _number(part.stop)
        if (begin, end, part.step) in ((None, None, None), (0, None, None)):
            return sel, None
        if numbers := _enumerate(begin, end, part.step):
            return _with(sel, pos=numbers), None
        # Where the prompt ends is not known here: its positions are read, and cut on the server.
        return _with(sel, phase="prefill"), _plain_ends(begin, end, part.step)
    if (listed := _numbers(part)) is not None:
        return _with(sel, pos=tuple(listed)), None
    at = _number(part)
    assert at is not None
    if at == -1 and (sel.phase == "decode" or sel.steps is not None):
        return _with(sel, pos="last"), 0
    return _with(sel, pos=(at,)), 0


def _coordinates(sel: Selector, name: str, part: Any) -> tuple[Selector, Part]:
    if isinstance(part, slice):
        begin, end = _number(part.start), _number(part.stop)
        if (begin, end, part.step) in ((None, None, None), (0, None, None)):
            return sel, None
        if (begin or 0) >= 0 and (numbers := _enumerate(begin or 0, end, part.step)):
            return _with(sel, **{name: numbers}), None
        return sel, _plain_ends(begin, end, part.step)
    if (listed := _numbers(part)) is not None:
        if min(listed, default=0) < 0:
            raise refuse(f"Listed {name} count from 0; {min(listed)} is not one of them.")
        return _with(sel, **{name: tuple(listed)}), None
    at = _number(part)
    assert at is not None
    if at < 0:
        return sel, at
    return _with(sel, **{name: (at,)}), 0


def _with(sel: Selector, **changes: object) -> Selector:
    try:
        return Selector.model_validate(dict(sel) | changes)
    except ValidationError as error:
        raise refuse(f"This index cannot be sent: {error.errors()[0]['msg']}.") from None


def _enumerate(begin: int | None, end: int | None, step: object) -> tuple[int, ...]:
    """Return a range's numbers if it has ends of one kind, both from the front or the back."""
    if begin is None:
        begin = 0
    if end is None and begin < 0:
        end = 0
    elif end is None or (begin < 0) != (end < 0):
        return ()
    stride = 1 if step is None else _number(step)
    assert stride is not None
    numbers = range(begin, end, stride)
    if not numbers:
        raise refuse(f"The range {begin}:{end} is empty.")
    return tuple(numbers) if len(numbers) <= MAX_ENUMERATED else ()


def _plain_ends(begin: int | None, end: int | None, step: object) -> Part:
    if step not in (None, 1):
        raise refuse("This slice has the step 1; list the entries instead.")
    return begin, end


def _numbers(part: Any) -> list[int] | None:
    """Return the integers of a list, a range or an array; ``None`` for anything else."""
    if hasattr(part, "tolist") and getattr(part, "ndim", 0) == 1:
        part = part.tolist()
    if isinstance(part, str) or not isinstance(part, Sequence):
        return None
    if any(isinstance(one, bool) for one in part):
        raise refuse("A traced value is not indexed by truth values; give the entries' numbers.")
    return [operator.index(one) for one in part]


def _number(part: Any) -> int | None:
    if part is None:
        return None
    if isinstance(part, bool):
        raise refuse("A traced value is not indexed by a truth value; give numbers.")
    try:
        return operator.index(part)
    except TypeError:
        kind = type(part).__name__
        raise refuse(
            f"A traced value is not indexed by {kind}; give numbers, lists, slices, or t.pos(text)."
        ) from None
