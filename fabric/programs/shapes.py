"""Shapes of values before there are any: axes by number or name, with what they can be at most.

An axis whose size depends on the step (the positions of a run that generates) or on a text that is
not tokenized yet has a name. Two axes of one name have one size in every step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from hashlib import sha256

from fabric.messages.nodes import MAX_AXES

FLOATS = ("float32", "bfloat16", "float16")


class Unfit(ValueError):
    """A node cannot be what it says; the message is the reason, without its full stop."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis.

    Args:
        size: A number, or the name of one that is not known yet.
        most: Its bound in any step.
        least: What it has at most in its smallest step; less than ``most``: it varies.
        total: Its bound summed over ``steps``.
        steps: The steps in which it is renewed, as bits.
    """

    size: int | str
    most: int
    least: int
    total: int = 0
    steps: int = 0

    @property
    def varies(self) -> bool:
        """Whether it is another number in another step."""
        return self.least != self.most

    @property
    def may_be_one(self) -> bool:
        """Whether it may turn out to be 1 in every step, and then broadcasts."""
        return isinstance(self.size, str) and not self.varies


Shape = tuple[Axis, ...]


def number(size: int) -> Axis:
    """Return the axis of a known size."""
    return Axis(size, size, size)


def numbers(sizes: tuple[int, ...]) -> Shape:
    """Return the shape of known sizes."""
    return tuple(number(size) for size in sizes)


def unknown(name: str, most: int) -> Axis:
    """Return an axis that is one number, not known yet, for all steps."""
    return Axis(shorten(name), most, most, most) if most > 1 else number(most)


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """What a node gives, before it does.

    Args:
        shape: Its axes.
        dtype: By its name on the wire.
        steps: The steps in which it is evaluated, as bits; 0: once, for all of them.
        positions: Whether its first axis are the positions of a selection.
        reach: The last point, by order, on whose reading it depends; -1: on none.
        from_gradient: Whether it depends on a gradient.
    """

    shape: Shape
    dtype: str
    steps: int = 0
    positions: bool = False
    reach: int = -1
    from_gradient: bool = False

    @property
    def num_steps(self) -> int:
        """How often it is evaluated."""
        return max(1, self.steps.bit_count())

    @property
    def first_step(self) -> int:
        """The first step in which it has a value."""
        return max(0, (self.steps & -self.steps).bit_length() - 1)

    @property
    def most(self) -> int:
        """Its numbers in one step, at most."""
        return math.prod(axis.most for axis in self.shape)

    @property
    def most_of_all_steps(self) -> int:
        """Its numbers in all steps together, at most."""
        if self.num_steps == 1:
            return self.most
        bounds = [self.num_steps * self.most]
        for place, axis in enumerate(self.shape):
            if axis.steps == self.steps and axis.varies:
                others = self.shape[:place] + self.shape[place + 1 :]
                bounds.append(axis.total * math.prod(other.most for other in others))
        return min(bounds)


def told(shape: Shape) -> str:
    """Return a shape as messages tell it: ``[T, 4, 16]``."""
    return f"[{', '.join(str(axis.size) for axis in shape)}]"


def join(a: Axis, b: Axis) -> Axis | None:
    """Return the one axis that both can be; ``None`` where their sizes differ.

    What is not known yet is taken for the other's size; the engine, which knows, checks it again.
    """
    if a.size == b.size:
        return a
    if a.varies or b.varies or not (isinstance(a.size, str) or isinstance(b.size, str)):
        return None
    known, open_ = (a, b) if isinstance(a.size, int) else (b, a)
    return known if known.most <= open_.most or isinstance(known.size, str) else None


def broadcast(*shapes: Shape) -> Shape:
    """Return the shape to which all are broadcast, aligned at their last axes.

    Raises:
        Unfit: Their sizes differ and neither is 1.
    """
    longest: Shape = max(shapes, key=len)
    result = list(longest)
    for shape in shapes:
        for place in range(1, len(shape) + 1):
            mine, axis = shape[-place], result[-place]
            if mine.size == 1 or mine.size == axis.size:
                continue
            joined = mine if axis.size == 1 else join(axis, mine)
            if joined is None and (mine.may_be_one or axis.may_be_one):
                joined = axis if mine.may_be_one else mine
            if joined is None:
                raise Unfit(f"{' and '.join(map(told, shapes))} do not broadcast")
            result[-place] = joined
    return tuple(result)


def needs_to_fit(what: str, shape: Shape, into: Shape) -> None:
    """Hold a value to the shape that it is written into, which it may not enlarge.

    Raises:
        Unfit: It has more axes, or another size.
    """
    fits = len(shape) <= len(into) and all(
        mine.size == 1 or mine.may_be_one or join(mine, other) is not None
        for mine, other in zip(reversed(shape), reversed(into), strict=False)
    )
    if not fits:
        raise Unfit(f"{what} has the shape {told(shape)}, which does not fit {told(into)}")


def place_of(axis: int, num_axes: int) -> int:
    """Return an axis's place, counted from the first.

    Raises:
        Unfit: There is no such axis.
    """
    if not -num_axes <= axis < num_axes:
        raise Unfit(f"axis {axis} is not one of the {num_axes} axes")
    return axis % num_axes


def plus(axes: tuple[Axis, ...]) -> Axis:
    """Return the axis of several one after the other."""
    if all(isinstance(axis.size, int) for axis in axes):
        return number(sum(axis.most for axis in axes))
    named = next(axis for axis in axes if isinstance(axis.size, str))
    return Axis(
        shorten("+".join(str(axis.size) for axis in axes)),
        sum(axis.most for axis in axes),
        sum(axis.least for axis in axes),
        sum(axis.total or axis.most * max(1, named.steps.bit_count()) for axis in axes),
        named.steps if all(axis.steps in (0, named.steps) for axis in axes) else 0,
    )


def times(factor: int, axes: tuple[Axis, ...]) -> Axis:
    """Return the axis of several merged into one."""
    named = tuple(axis for axis in axes if isinstance(axis.size, str))
    factor *= math.prod(axis.most for axis in axes if isinstance(axis.size, int))
    if not named:
        return number(factor)
    if factor == 1 and len(named) == 1:
        return named[0]
    most = math.prod(axis.most for axis in named)
    return Axis(
        shorten("*".join([*(str(axis.size) for axis in named), str(factor)])),
        factor * most,
        factor * math.prod(axis.least for axis in named),
    )


def cut(axis: Axis, begin: int | None, end: int | None) -> Axis:
    """Return what a half-open range leaves of an axis, as Python slices it."""
    if isinstance(axis.size, int):
        return number(len(range(axis.size)[begin:end]))
    if begin in (None, 0) and end is None:
        return axis
    most = _longest(axis.most, begin, end)
    if most <= 1 and axis.least >= 1 and (begin, end) in ((None, 1), (0, 1), (-1, None)):
        return number(1)
    least = len(range(axis.least)[begin:end]) if axis.varies else most
    name = f"{axis.size}[{'' if begin is None else begin}:{'' if end is None else end}]"
    return Axis(shorten(name), most, min(least, most), 0, axis.steps) if most else number(0)


def check_size(shape: Shape) -> Shape:
    """Return a shape that has no more axes than the wire can name.

    Raises:
        Unfit: It has more.
    """
    if len(shape) > MAX_AXES:
        raise Unfit(f"its shape {told(shape)} has more than {MAX_AXES} axes")
    return shape


def as_source(shape: Shape, run: str) -> Shape:
    """Return a shape as other runs see it, to whom its names are foreign and its steps are over."""
    return tuple(
        axis
        if isinstance(axis.size, int)
        else replace(
            axis, size=shorten(f"{run}:{axis.size}"), least=axis.most, total=axis.most, steps=0
        )
        for axis in shape
    )


def _longest(most: int, begin: int | None, end: int | None) -> int:
    # A range of a mixed sign is longest neither for the longest axis nor for the shortest.
    low, high = begin or 0, most if end is None else end
    if low < 0 <= high:
        return min(-low, high, most)
    if high < 0 <= low:
        return max(0, most + high - low)
    return max(0, min(high, most) - low) if low >= 0 else max(0, high - low)


def shorten(name: str) -> str:
    """Return a long name's stand-in: names of names would double with every node."""
    return name if len(name) <= 64 else f"{name[:24]}~{sha256(name.encode()).hexdigest()[:12]}"
