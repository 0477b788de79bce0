"""Where programs may read and write in one model version: its manifest of points."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fabric.messages.wire import Wire

Lane = Literal["graph", "boundary", "eager", "recompute", "autograd"]
"""How a point is served, cheapest first: inside the compiled step, between layers, by running its
layer eagerly, by computing again what fused kernels never write down, or with gradients."""


class PointSpec(Wire):
    """Points of one kind.

    ``pattern`` has ``{i}`` for the layer (``layers.{i}.attn.out``); it is for each of ``layers``
    (none: it has no layer). ``shape`` names the run's positions ``T``, its keys ``S``, and gives
    the other axes as numbers. ``dtype`` is that of the value read. ``lane`` is the cheapest one
    that serves it. What can be neither read nor written says why in ``reason``; what can only be
    read, why not written.
    """

    pattern: str
    layers: tuple[int, ...] = ()
    shape: tuple[Literal["T", "S"] | int, ...]
    dtype: str
    read: bool
    write: bool
    lane: Lane
    reason: str = ""


class PointManifest(Wire):
    """All points of a model version, in the order in which a forward pass comes by them.

    A pattern with ``{i}`` stands for a layer's whole sequence: layer 0's points in this order, then
    layer 1's, and so on. ``weights`` are the parameters by name, with their shapes.
    """

    model: str
    digest: str
    family: str
    dtype: str
    num_layers: int = Field(ge=1)
    hidden: int = Field(ge=1)
    vocabulary: int = Field(ge=1)
    context_tokens: int = Field(ge=1)
    num_parameters: int = Field(ge=0)
    points: tuple[PointSpec, ...]
    weights: dict[str, tuple[int, ...]] = {}
