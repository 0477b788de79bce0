"""Shapes and dtypes of pure computation: nodes over values that never touch the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from fabric.messages import nodes as n
from fabric.programs.shapes import (
    FLOATS,
    Axis,
    Shape,
    Unfit,
    Value,
    broadcast,
    check_size,
    cut,
    join,
    number,
    place_of,
    plus,
    times,
    told,
)

COMPARISONS = ("gt", "ge", "lt", "le", "eq")


def infer(node: n.Node, args: Sequence[Value]) -> Value:
    """Return what a pure node gives for the values it takes, in the order of its references.

    Raises:
        Unfit: It cannot take them.
    """
    x = args[0]
    match node:
        case n.Unary():
            needs_float(node.op, x)
            return given(args, x.shape, x.dtype, positions=x.positions)
        case n.Binary():
            return _element_by_element(args, _of_two(node.op, x, args[1:]))
        case n.Where():
            return _element_by_element(args, promote(args[1].dtype, args[2].dtype))
        case n.Matmul():
            shape = _matmul(x.shape, args[1].shape)
            batched = args[1] if len(args[1].shape) > 2 else x
            leads = _leads(x, shape) or _leads(batched, shape)
            return given(args, shape, _common_float(node.op, args), positions=leads)
        case n.Linear():
            leads = x.positions and len(x.shape) > 1
            return given(args, _linear(args), _common_float(node.op, args), positions=leads)
        case n.Einsum():
            return _einsum(node, args)
        case n.Reduce():
            return _reduce(node, x)
        case n.Cosine():
            both = _element_by_element(args, _common_float(node.op, args))
            place = place_of(node.axis, len(both.shape))
            shape = both.shape[:place] + both.shape[place + 1 :]
            return given(args, shape, both.dtype, positions=both.positions and place > 0)
        case n.Softmax():
            needs_float(node.op, x)
            place_of(node.axis, len(x.shape))
            return given(args, x.shape, "float32", positions=x.positions)
        case n.TopK():
            return _topk(node, x)
        case n.Slice():
            whole = not node.index or node.index[0] is None
            leads = x.positions and whole
            return given(args, sliced(x.shape, node.index), x.dtype, positions=leads)
        case n.Gather():
            return _gather(node, args)
        case n.Concat():
            return _concat(node, args)
        case n.Reshape():
            shape = (_permute if node.op == "permute" else _reshape)(x.shape, node.shape)
            return given(args, shape, x.dtype, positions=_keeps_first(node, x, shape))
        case n.Cast():
            return given(args, x.shape, node.dtype, positions=x.positions)
        case n.Gate():
            leads = x.positions and len(x.shape) > 0
            return given(args, (one_a_token("x", x),), "float32", positions=leads)
        case n.Noise():
            dtype = x.dtype if x.dtype in FLOATS else "float32"
            return given(args, x.shape, dtype, positions=x.positions)
    raise TypeError(f"{node.op} is not pure")


def given(args: Sequence[Value], shape: Shape, dtype: str, *, positions: bool = False) -> Value:
    """Return the value over ``args``: evaluated as soon as all are there, then whenever one is."""
    steps, since = 0, 0
    for arg in args:
        steps |= arg.steps
        since = max(since, arg.first_step)
    return Value(
        shape=check_size(shape),
        dtype=dtype,
        steps=steps >> since << since,
        positions=positions,
        reach=max(arg.reach for arg in args),
        from_gradient=any(arg.from_gradient for arg in args),
    )


def promote(*dtypes: str) -> str:
    """Return the dtype of an operation on several, as torch promotes them."""
    floats = {dtype for dtype in dtypes if dtype in FLOATS}
    if floats:
        return floats.pop() if len(floats) == 1 else "float32"
    return "int64" if "int64" in dtypes else "bool"


def needs_float(what: str, x: Value) -> None:
    """Raise Unfit where x has no floating-point dtype."""
    if x.dtype not in FLOATS:
        raise Unfit(f"{what} takes floating-point numbers and was given {x.dtype}; cast it first")


def one_a_token(what: str, x: Value) -> Axis:
    """Return the one axis of a value with one number a token (or one for all).

    Raises:
        Unfit: It has more.
    """
    if any(axis.size != 1 for axis in x.shape[1:]):
        raise Unfit(f"{what} must have one number a token and has the shape {told(x.shape)}")
    return x.shape[0] if x.shape else number(1)


def sliced(shape: Shape, index: Sequence[int | tuple[int | None, int | None] | None]) -> Shape:
    """Return the shape of ``x[index]``.

    Raises:
        Unfit: There are more indices than axes, or one is out of range.
    """
    if len(index) > len(shape):
        raise Unfit(f"{len(index)} indices are too many for the shape {told(shape)}")
    result: list[Axis] = []
    for axis, entry in zip(shape, index, strict=False):
        match entry:
            case None:
                result.append(axis)
            case int():
                check_index(entry, axis)
            case (begin, end):
                result.append(cut(axis, begin, end))
    return (*result, *shape[len(index) :])


def check_index(index: int, axis: Axis) -> None:
    """Raise Unfit where an index is certainly out of an axis's range."""
    if not -axis.least <= index < axis.least:
        raise Unfit(f"index {index} is out of range for an axis of {axis.size}")


def _element_by_element(args: Sequence[Value], dtype: str) -> Value:
    shape = broadcast(*(arg.shape for arg in args))
    return given(args, shape, dtype, positions=any(_leads(arg, shape) for arg in args))


def _leads(arg: Value, shape: Shape) -> bool:
    """Whether a result has its first axis, the positions, from this operand."""
    return arg.positions and len(arg.shape) == len(shape) and arg.shape[0].size == shape[0].size


def _of_two(op: str, x: Value, others: Sequence[Value]) -> str:
    y = others[0].dtype if others else ("float32" if x.dtype not in FLOATS else x.dtype)
    if op in COMPARISONS:
        return "bool"
    dtype = promote(x.dtype, y)
    if dtype == "bool":
        raise Unfit(f"{op} of two truth values has no meaning here; cast one first")
    return "float32" if op == "div" and dtype == "int64" else dtype


def _common_float(op: str, args: Sequence[Value]) -> str:
    for arg in args:
        needs_float(op, arg)
    return promote(*(arg.dtype for arg in args))


def _needs_same(what: str, a: Axis, b: Axis) -> Axis:
    joined = join(a, b)
    if joined is None:
        raise Unfit(f"{what} must be of one size and are {a.size} and {b.size}")
    return joined


def _matmul(x: Shape, y: Shape) -> Shape:
    if len(x) < 2 or len(y) < 2:
        raise Unfit(f"matmul takes two axes of each and was given {told(x)} and {told(y)}")
    _needs_same("x's last axis and y's last but one", x[-1], y[-2])
    return (*broadcast(x[:-2], y[:-2]), x[-2], y[-1])


def _linear(args: Sequence[Value]) -> Shape:
    x, weight = args[0].shape, args[1].shape
    if not x or len(weight) != 2:
        raise Unfit(f"linear takes a weight [out, in] and was given {told(weight)}")
    _needs_same("x's last axis and the weight's", x[-1], weight[1])
    if len(args) == 3:
        bias = args[2].shape
        if len(bias) != 1:
            raise Unfit(f"a bias has one axis and this has {told(bias)}")
        _needs_same("the weight's rows and the bias", weight[0], bias[0])
    return (*x[:-1], weight[0])


def _einsum(node: n.Einsum, args: Sequence[Value]) -> Value:
    taken, _, result = node.equation.partition("->")
    operands = taken.split(",")
    if len(operands) != len(args):
        raise Unfit(f"{node.equation!r} has {len(operands)} operands and {len(args)} are given")
    letters: dict[str, Axis] = {}
    for operand, arg in zip(operands, args, strict=True):
        if len(operand) != len(arg.shape):
            raise Unfit(f"{operand!r} in {node.equation!r} is not the shape {told(arg.shape)}")
        for letter, axis in zip(operand, arg.shape, strict=True):
            letters[letter] = _needs_same(f"axes {letter!r}", letters.get(letter, axis), axis)
    if Counter(result).keys() - letters.keys() or len(set(result)) != len(result):
        raise Unfit(f"{result!r} in {node.equation!r} must be letters of its operands, each once")
    leads = any(
        arg.positions and operand[:1] == result[:1] != ""
        for operand, arg in zip(operands, args, strict=True)
    )
    shape = tuple(letters[letter] for letter in result)
    return given(args, shape, _common_float("einsum", args), positions=leads)


def _reduce(node: n.Reduce, x: Value) -> Value:
    places = {place_of(axis, len(x.shape)) for axis in node.axes} or set(range(len(x.shape)))
    if node.axes and len(places) != len(node.axes):
        raise Unfit(f"an axis stands twice in {list(node.axes)}")
    if node.op == "argmax" and len(places) != 1:
        raise Unfit(f"argmax takes one axis and was given {len(places)}")
    if node.op in ("mean", "var", "norm", "logsumexp"):
        needs_float(node.op, x)
    if node.op in ("max", "min", "argmax") and any(x.shape[place].most == 0 for place in places):
        raise Unfit(f"{node.op} of nothing: the shape is {told(x.shape)}")
    dtype = "int64" if node.op == "argmax" or (node.op, x.dtype) == ("sum", "bool") else x.dtype
    shape = tuple(
        number(1) if place in places else axis
        for place, axis in enumerate(x.shape)
        if node.keepdim or place not in places
    )
    return given([x], shape, dtype, positions=x.positions and 0 not in places)


def _topk(node: n.TopK, x: Value) -> Value:
    if not x.shape or node.k > x.shape[-1].least:
        raise Unfit(f"the {node.k} largest of the shape {told(x.shape)} are not there")
    dtype = "int64" if node.part == "indices" else x.dtype
    if x.dtype == "bool":
        raise Unfit("topk of truth values has no meaning; cast them first")
    leads = x.positions and len(x.shape) > 1
    return given([x], (*x.shape[:-1], number(node.k)), dtype, positions=leads)


def _gather(node: n.Gather, args: Sequence[Value]) -> Value:
    x = args[0]
    place = place_of(node.axis, len(x.shape))
    if node.indices is not None:
        for index in node.indices:
            check_index(index, x.shape[place])
        new = number(len(node.indices))
    else:
        by = args[1]
        if by.dtype != "int64":
            raise Unfit(f"by has the dtype {by.dtype}; indices are int64")
        if len(by.shape) != 1:
            return _taken_along(place, args)
        new = by.shape[0]
    shape = (*x.shape[:place], new, *x.shape[place + 1 :])
    return given(args, shape, x.dtype, positions=x.positions and place > 0)


def _taken_along(place: int, args: Sequence[Value]) -> Value:
    x, by = args[0], args[1]
    if len(by.shape) != len(x.shape):
        raise Unfit(
            f"by has the shape {told(by.shape)}; it takes one axis, or as many as {told(x.shape)}"
        )
    for at, (axis, other) in enumerate(zip(x.shape, by.shape, strict=True)):
        if at != place:
            _needs_same("the other axes of x and by", axis, other)
    return given(args, by.shape, x.dtype, positions=x.positions and place > 0)


def _concat(node: n.Concat, args: Sequence[Value]) -> Value:
    first, dtypes = args[0], {arg.dtype for arg in args}
    stacks = node.op == "stack"
    place = place_of(node.axis, len(first.shape) + stacks)
    if len(dtypes) > 1:
        raise Unfit(f"{node.op} takes values of one dtype and was given {sorted(dtypes)}")
    for arg in args[1:]:
        if len(arg.shape) != len(first.shape):
            raise Unfit(f"{told(first.shape)} and {told(arg.shape)} have not as many axes")
        for at, (axis, other) in enumerate(zip(first.shape, arg.shape, strict=True)):
            if stacks or at != place:
                _needs_same("the other axes", axis, other)
    middle = number(len(args)) if stacks else plus(tuple(arg.shape[place] for arg in args))
    shape = (*first.shape[:place], middle, *first.shape[place + (not stacks) :])
    return given(args, shape, first.dtype, positions=first.positions and place > 0)


def _permute(x: Shape, order: Sequence[int]) -> Shape:
    if sorted(order) != list(range(len(x))):
        raise Unfit(f"{list(order)} is no order of the {len(x)} axes")
    return tuple(x[place] for place in order)


def _reshape(x: Shape, sizes: Sequence[int]) -> Shape:
    if sizes.count(-1) > 1:
        raise Unfit(f"-1 stands more than once in {list(sizes)}")
    known, named = times(1, tuple(a for a in x if isinstance(a.size, int))), _named(x)
    product = times(1, tuple(number(size) for size in sizes if size != -1))
    fits = (
        product.most and known.most % product.most == 0
        if -1 in sizes
        else (not named and known.most == product.most)
    )
    if not fits:
        hint = "; use -1 for what is not a number yet" if named and -1 not in sizes else ""
        raise Unfit(f"{told(x)} cannot be made {list(sizes)}{hint}")
    rest = times(known.most // product.most, named) if -1 in sizes else number(0)
    return tuple(rest if size == -1 else number(size) for size in sizes)


def _keeps_first(node: n.Reshape, x: Value, shape: Shape) -> bool:
    if not x.positions or not shape:
        return False
    return node.shape[0] == 0 if node.op == "permute" else x.shape[0].size == shape[0].size


def _named(x: Shape) -> tuple[Axis, ...]:
    return tuple(axis for axis in x if isinstance(axis.size, str))
