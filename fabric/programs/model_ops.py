"""Nodes that use the model's own modules and weights, and overlays of them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from fabric.messages import nodes as n
from fabric.messages.points import PointManifest
from fabric.messages.program import LowRank, Normalized, Overlay, Rows, Scaled
from fabric.programs.access import in_layers
from fabric.programs.constants import TensorSpec
from fabric.programs.points import NORMS
from fabric.programs.pure import given, needs_float, sliced
from fabric.programs.shapes import (
    FLOATS,
    Shape,
    Unfit,
    Value,
    join,
    number,
    numbers,
    told,
)

_LAYER = re.compile(r"layers\.\d{1,6}")
_CONV1D = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")
NUM_STATS = 5


def of_hidden(manifest: PointManifest, node: n.Norm | n.Unembed | n.Module, x: Value) -> Value:
    """Return what one of the model's modules makes of x.

    Raises:
        Unfit: There is no such module, or x is not what it takes.
    """
    needs_float(node.op, x)
    match node:
        case n.Norm():
            if not NORMS.fullmatch(node.site):
                raise Unfit(
                    f"{node.site!r} is no norm: name final.norm, layers.i.attn.norm or"
                    " layers.i.mlp.norm"
                )
            in_layers(manifest, node.site)
            _needs_last("x", x.shape, manifest.hidden)
            return given([x], x.shape, manifest.dtype, positions=x.positions)
        case n.Unembed():
            _needs_last("x", x.shape, manifest.hidden)
            shape = (*x.shape[:-1], number(manifest.vocabulary))
            return given([x], shape, logits_dtype(manifest), positions=_leads(x))
        case n.Module():
            return _module(manifest, node, x)


def token_rows(manifest: PointManifest, node: n.TokenRows) -> Value:
    """Return the rows of the embedding or the unembedding of some tokens, [n, hidden].

    Raises:
        Unfit: An id is not in the vocabulary.
    """
    needs_ids_in_vocabulary(node.ids, manifest)
    return Value(shape=numbers((len(node.ids), manifest.hidden)), dtype=manifest.dtype)


def weight_read(manifest: PointManifest, node: n.WeightRead) -> Value:
    """Return a slice of a parameter, or its five statistics.

    Raises:
        Unfit: There is no such parameter, or the index does not fit.
    """
    shape = sliced(numbers(weight(manifest, node.name)), node.index)
    if node.stats:
        return Value(shape=(number(NUM_STATS),), dtype="float32")
    return Value(shape=shape, dtype=manifest.dtype)


def needs_overlay_that_fits(
    manifest: PointManifest, overlay: Overlay, constants: Mapping[str, TensorSpec]
) -> None:
    """Hold an overlay to the weight that it changes.

    Raises:
        Unfit: There is no such weight or constant, or their shapes differ.
    """
    shape = weight(manifest, overlay.weight)
    if isinstance(overlay, Scaled):
        return
    if len(shape) != 2:
        raise Unfit(f"{overlay.weight!r} has the shape {list(shape)} and is no matrix; scale it")
    num_out, num_in = matrix(manifest, overlay.weight)
    match overlay:
        case LowRank():
            u, v = (constant(constants, name) for name in (overlay.u, overlay.v))
            if len(u.shape) != 2 or (num_out, num_in, u.shape[1]) != (u.shape[0], *v.shape):
                raise Unfit(
                    f"U {list(u.shape)} and V {list(v.shape)} must be [{num_out}, r] and"
                    f" [{num_in}, r] for {overlay.weight!r}"
                )
            _needs_float_constants(u, v)
        case Rows():
            x = constant(constants, overlay.x)
            if len(set(overlay.index)) != len(overlay.index) or max(overlay.index) >= num_out:
                raise Unfit(
                    f"its rows must be among the {num_out} of {overlay.weight!r}, each once"
                )
            if x.shape != (len(overlay.index), num_in):
                raise Unfit(f"{overlay.x!r} is not [{len(overlay.index)}, {num_in}]")
            _needs_float_constants(x)
        case Normalized():
            pass


def weight(manifest: PointManifest, name: str) -> tuple[int, ...]:
    """Return a parameter's shape.

    Raises:
        Unfit: The model has none of this name.
    """
    shape = manifest.weights.get(name)
    if shape is None:
        raise Unfit(f"the model has no parameter {name!r}")
    return shape


def matrix(manifest: PointManifest, name: str) -> tuple[int, int]:
    """Return the shape [out, in] of a matrix: GPT-2's own files have theirs as [in, out]."""
    first, second = manifest.weights[name]
    return (second, first) if is_transposed(manifest.family, name) else (first, second)


def is_transposed(family: str, name: str) -> bool:
    """Whether a parameter is kept as [in, out]."""
    return family.startswith("gpt2") and _CONV1D.search(name) is not None


def constant(constants: Mapping[str, TensorSpec], name: str) -> TensorSpec:
    """Return a constant.

    Raises:
        Unfit: The program has none of this name.
    """
    if name not in constants:
        raise Unfit(f"the program has no constant {name!r}")
    return constants[name]


def needs_ids_in_vocabulary(ids: tuple[int, ...], manifest: PointManifest) -> None:
    """Raise Unfit where a token's id is not in the vocabulary."""
    if max(ids) >= manifest.vocabulary:
        raise Unfit(f"token {max(ids)} is not in the vocabulary of {manifest.vocabulary}")


def logits_dtype(manifest: PointManifest) -> str:
    """Return the dtype of logits."""
    specs = (spec for spec in manifest.points if spec.pattern == "logits")
    return next((spec.dtype for spec in specs), manifest.dtype)


def _module(manifest: PointManifest, node: n.Module, x: Value) -> Value:
    if _LAYER.fullmatch(node.module):
        in_layers(manifest, node.module)
        if len(x.shape) != 2:
            raise Unfit(f"a layer takes [positions, hidden] and was given {told(x.shape)}")
        _needs_last("x", x.shape, manifest.hidden)
        return given([x], x.shape, manifest.dtype, positions=x.positions)
    name = matmul_weight(manifest, node.module)
    num_out, num_in = matrix(manifest, name)
    _needs_last("x", x.shape, num_in)
    shape = (*x.shape[:-1], number(num_out))
    return given([x], shape, manifest.dtype, positions=_leads(x))


def matmul_weight(manifest: PointManifest, module: str) -> str:
    """Return the name of the weight of one matmul, which is named with or without ``.weight``.

    Raises:
        Unfit: The model has no such matrix.
    """
    for name in (module, f"{module}.weight"):
        if len(manifest.weights.get(name, ())) == 2:
            return name
    raise Unfit(f"the model has no layer and no matrix {module!r}")


def _leads(x: Value) -> bool:
    return x.positions and len(x.shape) > 1


def _needs_last(what: str, shape: Shape, size: int) -> None:
    if not shape or join(shape[-1], number(size)) is None:
        raise Unfit(f"{what} has the shape {told(shape)}; its last axis must be {size}")


def _needs_float_constants(*specs: TensorSpec) -> None:
    if any(spec.dtype not in FLOATS for spec in specs):
        raise Unfit("an overlay takes floating-point constants")
