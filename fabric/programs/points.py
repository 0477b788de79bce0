"""Points by name: their canonical form, what a manifest says of them, their order."""

from __future__ import annotations

import difflib
import re

from fabric.errors import PointUnknown
from fabric.messages.points import PointManifest, PointSpec

_CANONICAL = re.compile(r"[a-z][a-z0-9_.]{0,95}")
_INDEX = re.compile(r"\[(-?\d{1,6})\]")
_LAYER = re.compile(r"layers\.(\d{1,6})(?=\.|$)")
MODULES = re.compile(r"layers\.(\d{1,6})(\.attn|\.mlp)?")
"""What may be skipped."""
NORMS = re.compile(r"final\.norm|layers\.(\d{1,6})\.(attn|mlp)\.norm")
"""The model's own norms, by the point that they lead to."""


def canonical(text: str) -> str:
    """Return a point's canonical form: ``layers[5].attn.out`` is ``layers.5.attn.out``.

    Raises:
        PointUnknown: No point of any model can have this name.
    """
    name = _INDEX.sub(r".\1", text.strip())
    if not _CANONICAL.fullmatch(name):
        raise PointUnknown(point=text[:128], reason="names are like layers.5.attn.out")
    return name


def resolve(manifest: PointManifest, point: str) -> PointSpec:
    """Return what the manifest says of a point.

    Raises:
        PointUnknown: The model has no such point; the reason says what is nearest.
    """
    return manifest.points[_place(manifest, canonical(point))[0]]


def order_of(manifest: PointManifest, point: str) -> int:
    """Return a point's position in the forward pass.

    Raises:
        PointUnknown: The model has no such point.
    """
    index, layer = _place(manifest, canonical(point))
    of_layers = [i for i, spec in enumerate(manifest.points) if spec.layers]
    if not of_layers or index < of_layers[0]:
        return index
    if layer is not None:
        return of_layers[0] + layer * len(of_layers) + of_layers.index(index)
    return index + (manifest.num_layers - 1) * len(of_layers)


def layer_of(point: str) -> int | None:
    """Return the layer that a point is in; ``None`` for those outside of all layers."""
    found = _LAYER.match(point)
    return int(found[1]) if found else None


def _place(manifest: PointManifest, point: str) -> tuple[int, int | None]:
    layer = layer_of(point)
    pattern = point if layer is None else _LAYER.sub("layers.{i}", point)
    for index, spec in enumerate(manifest.points):
        if spec.pattern == pattern:
            if layer is not None and layer >= manifest.num_layers:
                raise PointUnknown(
                    point=point, reason=f"its layers are 0 to {manifest.num_layers - 1}"
                )
            if layer is not None and layer not in spec.layers:
                raise PointUnknown(point=point, reason=f"layer {layer} has none")
            return index, layer
    near = difflib.get_close_matches(pattern, [spec.pattern for spec in manifest.points], n=1)
    raise PointUnknown(
        point=point, reason=f"the nearest is {near[0]}" if near else "nothing like it"
    )
