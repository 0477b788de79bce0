"""Where a loaded model's points are, found in its structure and held to what it computes.

Every point is watched while a few tokens run. One that is not what its name says (the residual
stream that a layer's parts add up to, a projection with so many heads) is refused with the reason.

Shapes: N tokens, F features of a module, H heads, K key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fabric.engine.programs.anatomy import Anatomy, LayerParts
from fabric.engine.programs.routing import Route
from fabric.engine.programs.watch import Heads, Seen, Watch
from fabric.messages import PointManifest, PointSpec
from fabric.messages.points import Lane

Side = Literal["in", "out", "attention", "logits", "sample"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tap:
    """Where one point is met.

    Args:
        side: What of it: a module's input, its output, inside our attention, or after the model.
        module: Whose.
        layer: Whose attention.
        heads: The features stand for so many heads; 0: they are not divided.
        columns: Which of the features; ``None``: all.
        item: Which of several outputs.
        route: Makes the other outputs of a router from this one.
        shared: Others hold the same tensor, and a write must reach them: it is changed in place.
    """

    side: Side
    module: nn.Module | None = None
    layer: int | None = None
    heads: int = 0
    columns: tuple[int, int] | None = None
    item: int = 0
    route: Route | None = None
    shared: bool = False

    def view(self, x_NF: Tensor) -> Tensor:
        """Return the point's own view of a module's tensor, [N, F] or [N, H, D]."""
        if self.columns is not None:
            x_NF = x_NF[:, slice(*self.columns)]
        return x_NF.unflatten(-1, (self.heads, -1)) if self.heads else x_NF


def flat(x: Tensor) -> Tensor:
    """Return a module's tensor without its batch axis of one: [N, ...]."""
    return x[0] if x.dim() > 2 else x


@dataclass(frozen=True, slots=True, kw_only=True)
class _Site:
    """A point of one layer (or of none) as it was found: where, in what shape; or why not."""

    name: str
    tap: Tap | None = None
    tail: tuple[Literal["S"] | int, ...] = ()
    dtype: str = ""
    write: bool = True
    lane: Lane = "boundary"
    reason: str = ""


class Points:
    """The points of one loaded model.

    Args:
        model: Set to our attention.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.anatomy = Anatomy.of(model)
        self.taps: dict[str, Tap] = {}
        """By canonical name, those that can be served."""
        self.tuples: frozenset[nn.Module] = frozenset()
        """Modules that give a tuple, their tensor first."""
        self._model = model
        self._dtype = str(model.dtype).removeprefix("torch.")
        self._hidden: int = model.get_input_embeddings().weight.shape[1]

    @cached_property
    def hooked(self) -> frozenset[str]:
        """Points that are served by a hook on one module which changes nothing but its tensor."""
        return frozenset(
            point
            for point, tap in self.taps.items()
            if tap.module is not None and tap.route is None and not point.endswith(".head_out")
        )

    def manifest(
        self,
        *,
        name: str,
        digest: str,
        context_tokens: int,
        weights: Mapping[str, tuple[int, ...]],
    ) -> PointManifest:
        """Find the points and return what programs may read and write.

        Args:
            name: What the instance calls the model.
            digest: Of its tensors.
            context_tokens: The longest row.
            weights: Its parameters by name, with their shapes.
        """
        model = self._model
        vocabulary, hidden = model.get_input_embeddings().weight.shape
        return PointManifest(
            model=name,
            digest=digest,
            family=model.config.model_type,
            dtype=self._dtype,
            num_layers=model.config.num_hidden_layers,
            hidden=hidden,
            vocabulary=vocabulary,
            context_tokens=context_tokens,
            num_parameters=sum(torch.Size(shape).numel() for shape in weights.values()),
            points=self.find(),
            weights=dict(weights),
        )

    def find(self) -> tuple[PointSpec, ...]:
        """Run a few tokens and find the points, their taps with them."""
        anatomy = self.anatomy
        vocabulary: int = self._model.get_input_embeddings().weight.shape[0]
        outer = [
            _Site(name="logits", tap=Tap(side="logits"), tail=(vocabulary,), dtype="float32"),
            _Site(name="sample", tap=Tap(side="sample"), dtype="int64"),
        ]
        if anatomy is None:
            return self._listed([], [], outer)
        seen = Watch(self._model, anatomy).run()
        self.tuples = seen.tuples
        embedding = _Site(
            name="embed.out",
            tap=Tap(side="out", module=anatomy.embedding),
            tail=(self._hidden,),
            dtype=self._dtype,
        )
        if anatomy.final_norm is not None:
            norm = Tap(side="out", module=anatomy.final_norm)
            outer.insert(
                0,
                _Site(name="final.norm.out", tap=norm, tail=(self._hidden,), dtype=self._dtype),
            )
        layers = [self._layer(index, parts, seen) for index, parts in enumerate(anatomy.layers)]
        return self._listed([embedding], layers, outer)

    def _listed(
        self, before: list[_Site], layers: list[list[_Site]], after: list[_Site]
    ) -> tuple[PointSpec, ...]:
        """Note the taps, and return the sites of all layers by kind."""
        specs = [self._spec(site, ()) for site in before]
        names = list(dict.fromkeys(site.name for sites in layers for site in sites))
        order = sorted(names, key=_ORDER.index)
        for name in order:
            having = {i: s for i, sites in enumerate(layers) for s in sites if s.name == name}
            served = {i: s for i, s in having.items() if s.tap is not None} or having
            for index, site in served.items():
                if site.tap is not None:
                    self.taps[f"layers.{index}.{name}"] = site.tap
            specs.append(self._spec(next(iter(served.values())), tuple(served)))
        return (*specs, *(self._spec(site, ()) for site in after))

    def _spec(self, site: _Site, layers: tuple[int, ...]) -> PointSpec:
        if not layers and site.tap is not None:
            self.taps[site.name] = site.tap
        return PointSpec(
            pattern=f"layers.{{i}}.{site.name}" if layers else site.name,
            layers=layers,
            shape=("T", *site.tail),
            dtype=site.dtype or self._dtype,
            read=site.tap is not None,
            write=site.tap is not None and site.write,
            lane=site.lane,
            reason=site.reason,
        )

    def _layer(self, index: int, parts: LayerParts, seen: Seen) -> list[_Site]:
        heads = seen.heads[index]
        return [
            self._flat("in", Tap(side="in", module=parts.layer)),
            *self._attention(index, parts, heads),
            self._middle(index, parts, seen),
            *self._mlp(parts, seen),
            self._flat("out", Tap(side="out", module=parts.layer)),
        ]

    def _flat(self, name: str, tap: Tap, *, width: int | None = None, lane: Lane = "boundary"
              ) -> _Site:  # fmt: skip
        return _Site(name=name, tap=tap, tail=(width or self._hidden,), lane=lane)

    def _attention(self, index: int, parts: LayerParts, heads: Heads) -> list[_Site]:
        sites = [self._flat("attn.in", Tap(side="in", module=parts.attention), lane="eager")]
        sizes = {"q": (heads.num, heads.size), "k": (heads.num_kv, heads.size),
                 "v": (heads.num_kv, heads.value_size)}  # fmt: skip
        begin = 0
        for name, (num, size) in sizes.items():
            module, width = getattr(parts, name), num * size
            columns = None
            if module is None and parts.fused is not None:
                module, columns = parts.fused, (begin, begin + width)
            begin += width
            if module is None or (columns is None and _width(module) not in (None, width)):
                sites.append(
                    _Site(name=f"attn.{name}", tail=(num, size),
                          reason=f"its projection does not give {num} heads of {size} alone")
                )  # fmt: skip
                continue
            tap = Tap(side="out", module=module, heads=num, columns=columns)
            sites.append(_Site(name=f"attn.{name}", tap=tap, tail=(num, size), lane="eager"))
        for name, (num, size) in {"q_rope": sizes["q"], "k_rope": sizes["k"]}.items():
            if _rotates(self._model):
                tap = Tap(side="attention", layer=index)
                sites.append(_Site(name=f"attn.{name}", tap=tap, tail=(num, size), lane="eager"))
            else:
                reason = "its positions are not rotary; it is the same as without _rope"
                sites.append(_Site(name=f"attn.{name}", tail=(num, size), reason=reason))
        inner = Tap(side="attention", layer=index)
        for name in ("scores", "pattern"):
            sites.append(
                _Site(name=f"attn.{name}", tap=inner, tail=(heads.num, "S"), dtype="float32",
                      lane="recompute")
            )  # fmt: skip
        sites.append(
            _Site(name="attn.z", tap=inner, tail=(heads.num, heads.value_size), lane="eager")
        )
        tail = (heads.num, self._hidden)
        if parts.output is None:
            reason = "its output projection is not found"
            sites.append(_Site(name="attn.head_out", tail=tail, reason=reason))
        else:
            tap = Tap(side="out", module=parts.output, heads=heads.num)
            sites.append(_Site(name="attn.head_out", tap=tap, tail=tail, lane="recompute"))
        sites.append(self._flat("attn.out", Tap(side="out", module=parts.attention)))
        return sites

    def _middle(self, index: int, parts: LayerParts, seen: Seen) -> _Site:
        reason = seen.middle_reasons.get(index)
        if reason is None:
            tap = Tap(side="in", module=parts.mlp_norm, shared=True)
            return self._flat("mid", tap)
        return _Site(name="mid", tail=(self._hidden,), reason=reason)

    def _mlp(self, parts: LayerParts, seen: Seen) -> list[_Site]:
        mlp, widths = parts.mlp, seen.widths
        if mlp is None:
            return []
        sites = [self._flat("mlp.in", Tap(side="in", module=mlp), lane="eager")]
        fused = "its experts are fused: what is inside them is never written down"
        if parts.experts is not None and parts.router in widths:
            assert parts.router is not None
            width = widths[parts.router]
            route = seen.routes.get(parts.router)
            sites.append(
                _Site(
                    name="moe.router",
                    tap=Tap(side="out", module=parts.router, route=route),
                    tail=(width,),
                    write=route is not None,
                    lane="eager",
                    reason="" if route else "how experts are chosen of its logits is not known",
                )
            )
            sites.append(
                _Site(name="moe.experts", tap=Tap(side="out", module=parts.router, item=2),
                      tail=(getattr(parts.router, "top_k", 1),), dtype="int64", write=False,
                      lane="eager", reason="the choice of experts cannot be replaced")
            )  # fmt: skip
        missing = fused if parts.experts is not None else "its MLP has none"
        gates: list[tuple[str, nn.Module | None, Side]] = [
            ("mlp.gate", parts.gate, "out"), ("mlp.up", parts.up, "out"),
            ("mlp.act", parts.down, "in"),
        ]  # fmt: skip
        for name, module, side in gates:
            if module is None or module not in widths:
                width = next(iter(widths.values()), self._hidden)
                sites.append(_Site(name=name, tail=(width,), reason=missing))
            else:
                tap = Tap(side=side, module=module)
                sites.append(self._flat(name, tap, width=widths[module], lane="eager"))
        sites.append(self._flat("mlp.out", Tap(side="out", module=mlp)))
        return sites


_ORDER = (
    "in", "attn.in", "attn.q", "attn.k", "attn.v", "attn.q_rope", "attn.k_rope", "attn.scores",
    "attn.pattern", "attn.z", "attn.head_out", "attn.out", "mid", "mlp.in", "moe.router",
    "moe.experts", "mlp.gate", "mlp.up", "mlp.act", "mlp.out", "out",
)  # fmt: skip
"""A layer's points, as a forward pass comes by them."""


def _width(module: nn.Module) -> int | None:
    for name in ("out_features", "nf"):
        if isinstance(size := getattr(module, name, None), int):
            return size
    return None


def _rotates(model: PreTrainedModel) -> bool:
    return any("rotary" in name for name, _ in model.base_model.named_children())
