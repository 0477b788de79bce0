"""Places in the forward pass: ``t.layers[5].attn.out`` is read when used, and can be changed."""

from __future__ import annotations

from collections.abc import Iterator, Set
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal

from fabric.messages import nodes as wire
from fabric.sdk.tracing.index import Region, select
from fabric.sdk.tracing.lines import refuse
from fabric.sdk.tracing.operand import Operand
from fabric.sdk.tracing.values import Compared, Value

if TYPE_CHECKING:
    from fabric.sdk.tracing.run import TracedRun


class Place(Operand):
    """A point of a run's forward pass, or a part of it.

    Used in an expression it is its value there. ``place += x``, ``place *= k`` and
    ``place[index] = x`` change it, as do the methods.

    Args:
        run: The run.
        point: The point in canonical form.
        region: Which part.
        ndim: The axes of the whole point.
    """

    __slots__ = ("_ndim", "_region", "_run", "point")

    def __init__(self, run: TracedRun, point: str, region: Region, ndim: int) -> None:
        self._run = run
        self._region = region
        self._ndim = ndim
        self.point = point

    def __repr__(self) -> str:
        return f"<Place {self.point} of run {self._run.id!r}>"

    def __getitem__(self, index: Any) -> Any:
        if self._region.is_plain and not isinstance(index, Operand):
            return Place(self._run, self.point, select(self._region, index, self._ndim), self._ndim)
        return self._value()[index]

    def __setitem__(self, index: Any, x: object) -> None:
        if not self._region.is_plain:
            raise refuse("What is changed is given by one index: place[3, 5], not place[3][5].")
        part = self[index]
        if not isinstance(x, Place) or not part.is_same(x):
            part.set(x)

    def __iadd__(self, x: object) -> Place:  # type: ignore[override]
        return self.add(x)

    def __isub__(self, x: object) -> Place:  # type: ignore[override]
        return self.add(x, alpha=-1.0)

    def __imul__(self, k: object) -> Place:  # type: ignore[override]
        if isinstance(k, int | float):
            return self.scale(k)
        return self.set(self._value() * k)

    def __itruediv__(self, k: object) -> Place:  # type: ignore[override]
        return self.set(self._value() / k)

    def is_same(self, other: Place) -> bool:
        """Whether the other is the same part of the same run's point."""
        return (self._run, self.point, self._region) == (other._run, other.point, other._region)

    def set(
        self, x: object, *, alpha: float = 1.0, mask: object = None, gate: object = None
    ) -> Place:
        """Let it be x, or (1 - am)h + am·x with a strength a and a mask m."""
        return self._write(x, "set", alpha=alpha, mask=mask, gate=gate)

    def add(
        self,
        x: object,
        *,
        alpha: float = 1.0,
        norm: Literal["none", "match", "preserve"] = "none",
        mask: object = None,
        gate: object = None,
    ) -> Place:
        """Add x, a times; ``match`` gives x the length of h first, ``preserve`` keeps h's."""
        return self._write(x, "add", alpha=alpha, norm=norm, mask=mask, gate=gate)

    def scale(self, k: float, *, mask: object = None, gate: object = None) -> Place:
        """Multiply by a number."""
        return self._change(wire.Write, mode="scale", alpha=float(k), **self._refs(mask, gate))

    def project(self, v: object, c: float = 0.0, *, gate: object = None) -> Place:
        """Multiply what it has in the direction v: by 0 removes it, by 2 doubles it."""
        return self._change(wire.Project, v=self._run.ref(v), c=c, **self._refs(None, gate))

    def clamp(
        self, v: object, lo: float, hi: float, *, s: float = 1.0, gate: object = None
    ) -> Place:
        """Keep what it has in the direction v between two bounds, at a strength s."""
        refs = self._refs(None, gate)
        return self._change(wire.Clamp, v=self._run.ref(v), lo=lo, hi=hi, s=s, **refs)

    @property
    def sel(self) -> wire.Selector:
        """Which part, as the wire says it."""
        return self._region.sel

    def _value(self) -> Value:
        at = self._run.record.add(wire.Read, at=self.point, sel=self.sel)
        value = Value(self._run, at, self._ndim)
        if not self._region.cut:
            return value
        ndim = self._ndim - len(self._region.dropped)
        return value._make(wire.Slice, ndim, index=self._region.cut)

    def _write(self, x: object, mode: str, **fields: Any) -> Place:
        refs = self._refs(fields.pop("mask"), fields.pop("gate"))
        return self._change(wire.Write, x=self._fit(x), mode=mode, **fields, **refs)

    def _fit(self, x: object) -> int:
        """Return the node of x with the axes again that this part's index has dropped."""
        if isinstance(x, int) and self._run.spec(self.point).dtype == "int64":
            x = [x]  # a token: other numbers are floating ones
        value = self._run.value(x)
        for axis in self._region.dropped:
            # Axes before it broadcast; where x has none of them, nothing is to be put in.
            if axis and value.ndim is not None and value.ndim >= self._ndim - axis:
                value = value.unsqueeze(axis - self._ndim + value.ndim + 1)
        return value.node

    def _refs(self, mask: object, gate: object) -> dict[str, int]:
        made = {} if mask is None else {"mask": self._run.ref(mask)}
        if gate is not None:
            is_test = isinstance(gate, Compared) and gate.run is self._run
            made["gate"] = gate.gate() if is_test else self._run.ref(gate)  # type: ignore[attr-defined]
        return made

    def _change(self, kind: type[Any], **fields: object) -> Place:
        if not self._region.can_be_written:
            raise refuse(
                f"Which part of {self.point} is changed must be known before the prompt is: give"
                " positions as numbers, as ranges with two ends, or as t.pos(text)."
            )
        spec = self._run.spec(self.point)
        if not spec.write:
            raise refuse(f"{self.point} can only be read: {spec.reason or 'it is an input'}.")
        self._run.record.add(kind, at=self.point, sel=self.sel, **fields)
        return self


class Places:
    """Points below a name: ``t.layers[5].attn`` has ``out``, ``q``, and so on."""

    def __init__(self, run: TracedRun, prefix: str, names: Set[str]) -> None:
        self.__dict__.update(_run=run, _prefix=prefix, _names=names)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._find(name)

    def __setattr__(self, name: str, x: object) -> None:
        place = self._find(name)
        if not isinstance(place, Place):
            raise refuse(f"{self._prefix}.{name} is not a point; only points can be changed.")
        if not isinstance(x, Place) or not place.is_same(x):
            place.set(x)

    def __dir__(self) -> list[str]:
        return sorted("in_" if name == "in" else name for name in _heads(self._names))

    def __repr__(self) -> str:
        return f"<{self._prefix}: {', '.join(self.__dir__())}>"

    def skip(self, x: object) -> None:
        """Let the module's output be x instead of what it computes."""
        run = self._run
        run.record.add(wire.Skip, module=self._prefix, x=run.ref(x), sel=run.within)

    def _find(self, name: str) -> Place | Places:
        name = name.removesuffix("_")  # `in` is a word of Python's own; write `in_`
        below = _below(self._names, name)
        if below == {""}:
            point: Place = self._run.place(f"{self._prefix}.{name}")
            return point
        if not below:
            raise unknown(f"{self._prefix}.{name}", name, _heads(self._names))
        return Places(self._run, f"{self._prefix}.{name}", below)


class Layers:
    """The layers, by number; negative ones count from the last."""

    def __init__(self, run: TracedRun, num_layers: int, names: Set[str]) -> None:
        self._run = run
        self._num_layers = num_layers
        self._names = names

    def __len__(self) -> int:
        return self._num_layers

    def __getitem__(self, layer: int) -> Places:
        if not hasattr(layer, "__index__"):
            raise refuse("Layers are taken one at a time, by number: loop over them.")
        number = layer.__index__()
        if not -self._num_layers <= number < self._num_layers:
            raise refuse(f"There is no layer {number}; the model has {self._num_layers}.")
        number %= self._num_layers
        return Places(self._run, f"layers.{number}", self._names)

    def __iter__(self) -> Iterator[Places]:
        return (self[layer] for layer in range(self._num_layers))


def unknown(what: str, name: str, known: Set[str]) -> Exception:
    """Return the error of a point that is not there."""
    close = get_close_matches(name, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return refuse(f"There is no point {what}; there are {', '.join(sorted(known))}.{hint}")


def _heads(names: Set[str]) -> Set[str]:
    return {name.partition(".")[0] for name in names}


def _below(names: Set[str], head: str) -> Set[str]:
    return {
        name.removeprefix(head).removeprefix(".")
        for name in names
        if name == head or name.startswith(f"{head}.")
    }
