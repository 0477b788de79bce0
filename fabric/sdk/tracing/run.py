"""One run of a trace: a prompt, how it goes on, and what is done inside its forward passes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Literal

from fabric.messages import PointSpec
from fabric.messages import nodes as wire
from fabric.messages import program as envelope
from fabric.messages.nodes import ALL, Selector, Span
from fabric.messages.program import Generate, ProgramRun
from fabric.sdk.tracing.edit import Edit
from fabric.sdk.tracing.index import Region
from fabric.sdk.tracing.lines import Line, refuse
from fabric.sdk.tracing.operand import Operand
from fabric.sdk.tracing.places import Layers, Place, Places, unknown
from fabric.sdk.tracing.record import Order
from fabric.sdk.tracing.scope import Scope, as_constant
from fabric.sdk.tracing.values import Saved, Value

if TYPE_CHECKING:
    from fabric.messages import Program
    from fabric.sdk.programs import ProgramUsage, Quote
    from fabric.sdk.tracing.session import Session

Prompt = str | Sequence[int]


class TracedRun(Scope):
    """What ``with fabric.trace(...) as t`` gives: the points, and functions over values.

    ``t.layers[5].attn.out``, ``t.embed.out``, ``t.final.norm.out``, ``t.logits`` are places; the
    model's manifest (``fabric points``) lists them.

    Args:
        session: What it belongs to.
        id: Its name in the program.
        prompt: A text or token ids.
        gen: How it goes on.
    """

    def __init__(self, session: Session, id: str, prompt: Prompt, gen: Generate) -> None:
        super().__init__(session, id)
        self.prompt = prompt
        self._gen = gen
        self._within = ALL
        self._overlays: list[Any] = []
        self._start_at: envelope.StartAt | None = None
        self._stop_at: int | None = None

    def __enter__(self) -> TracedRun:
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or "_session" not in self.__dict__:
            raise AttributeError(name)
        return self._find(name)

    def __setattr__(self, name: str, x: object) -> None:
        if name in _OWN or name.startswith("_"):
            object.__setattr__(self, name, x)
            return
        place = self._find(name)
        if not isinstance(place, Place):
            raise refuse(f"{name} is not a point; only points can be changed.")
        if not isinstance(x, Place) or not place.is_same(x):
            place.set(x)

    # Where and when

    @property
    def layers(self) -> Layers:
        """The layers' points."""
        manifest = self._session.manifest
        return Layers(self, manifest.num_layers, self._session.names["layers"])

    def place(self, point: str) -> Place:
        """Return a point by its name: ``layers.5.attn.out``.

        Raises:
            TraceError: There is none of that name.
        """
        point = point.replace("[", ".").replace("]", "")
        return Place(self, point, Region(self._within), len(self.spec(point).shape))

    def pos(self, text: str, occurrence: int = 0) -> Span:
        """Return the positions of the tokens that cover a text in the prompt."""
        return Span(span=text, occurrence=occurrence)

    def prefill(self) -> AbstractContextManager[TracedRun]:
        """Within this block, points are those of the prompt's tokens alone."""
        return self._inside(phase="prefill")

    def decode(self) -> AbstractContextManager[TracedRun]:
        """Within this block, points are those of generated tokens alone; -1 is each step's."""
        return self._inside(phase="decode")

    def step(self, step: int) -> AbstractContextManager[TracedRun]:
        """Within this block, points are those of one step: 0 is the prompt's."""
        return self._inside(steps=(step, step + 1))

    def steps(self, begin: int, end: int) -> AbstractContextManager[TracedRun]:
        """Within this block, points are those of the steps from ``begin`` to before ``end``."""
        return self._inside(steps=(begin, end))

    # The run as a whole

    def grad(self, scalar: object, *, wrt: Place) -> Value:
        """Return the gradient of a number with respect to a place, in that place's shape."""
        if not isinstance(wrt, Place) or wrt._run is not self:
            raise refuse("A gradient is with respect to a place of this run: t.layers[5].out.")
        at = self.record.add(wire.Grad, scalar=self.ref(scalar), wrt=wrt.point, sel=wrt.sel)
        value = Value(self, at, wrt._ndim)
        return value[wrt._region.cut] if wrt._region.dropped else value

    def overlay(
        self,
        weight: str | Edit,
        *,
        lowrank: tuple[object, object] | None = None,
        scale: float | None = None,
        rows: Mapping[int, object] | None = None,
        normalize: Literal[0, 1] | None = None,
        alpha: float = 1.0,
    ) -> None:
        """Change a weight W [out, in] for this run alone.

        Args:
            weight: The parameter's name, or a whole ``Edit``.
            lowrank: U [out, r] and V [in, r] of W + alpha · U Vᵀ.
            scale: k of k W.
            rows: New rows [in] by their number.
            normalize: The axis along which every row (1) or column (0) is given length 1.
            alpha: The strength of ``lowrank``.
        """
        if isinstance(weight, Edit):
            edit = weight
            weight, lowrank, alpha = edit.weight, (edit.u, edit.v), edit.alpha
        known = self._session.manifest.weights
        if known and weight not in known:
            raise unknown(weight, weight, known.keys())
        overlays: list[Any] = []
        if lowrank is not None:
            u, v = (self._session.add_constant(as_constant(one)) for one in lowrank)
            overlays.append(envelope.LowRank(weight=weight, u=u, v=v, alpha=alpha))
        if scale is not None:
            overlays.append(envelope.Scaled(weight=weight, k=scale))
        if rows is not None:
            x = self._session.add_constant(as_constant(list(rows.values())))
            overlays.append(envelope.Rows(weight=weight, index=tuple(rows), x=x))
        if normalize is not None:
            overlays.append(envelope.Normalized(weight=weight, axis=normalize))
        if len(overlays) != 1:
            raise refuse("An overlay is one of lowrank, scale, rows and normalize.")
        self._overlays += overlays

    def start_at(self, layer: int, x: object) -> None:
        """Enter the stack before a layer, with hidden states [positions, hidden]."""
        if isinstance(x, Saved) and x.run.is_done:
            x = x.value
        if isinstance(x, Operand):
            value = x._value()
            if value.run is self:
                raise refuse("A run starts from an array or from a value of another run.")
            name = f"{value.run.id}/{value.run.keep(value).name}"
        else:
            name = self._session.add_constant(as_constant(x))
        self._start_at = envelope.StartAt(layer=layer, x=name)

    def stop_at(self, layer: int) -> None:
        """End the forward pass before a layer."""
        self._stop_at = layer

    @property
    def program(self) -> Program:
        """The program as recorded so far."""
        return self._session.program

    def quote(self) -> Quote:
        """Return what the program recorded so far would take at most."""
        return self._session.quote()

    # Afterwards

    @property
    def text(self) -> str:
        """What was generated."""
        return self.result.text

    @property
    def tokens(self) -> tuple[int, ...]:
        """The ids that were generated."""
        return self.result.tokens

    @property
    def usage(self) -> ProgramUsage:
        """What the whole program consumed."""
        return self._session.done.usage

    @property
    def charge_usu(self) -> int:
        """What the whole program cost, in micro-SU."""
        return self._session.done.charge_usu

    @property
    def site(self) -> str | None:
        """Where it was computed."""
        return self._session.done.site

    @property
    def digest(self) -> str:
        """The digest of the model's tensors."""
        return self._session.done.digest

    def _repr_html_(self) -> str:
        return self._session.done._repr_html_() if self.is_done else repr(self)

    def joined_ndim(self, value: Value) -> int | None:
        """Return the axes of a save of a value, which several steps may have one more of."""
        return value.ndim if self._gen.max_tokens <= 1 else None

    # For the other parts of the tracer

    @property
    def within(self) -> Selector:
        """The steps that the current line stands in."""
        return self._within

    def spec(self, point: str) -> PointSpec:
        """Return what the manifest says of a point.

        Raises:
            TraceError: There is no such point.
        """
        from fabric.errors import FabricError
        from fabric.programs import resolve

        try:
            return resolve(self._session.manifest, point)
        except FabricError as error:
            raise refuse(error.message) from None

    def compile(self, order: Order) -> tuple[ProgramRun, tuple[Line, ...]]:
        """Return the run as it is sent, and the line of each node."""
        nodes, lines = self.record.compile(order)
        is_text = isinstance(self.prompt, str)
        run = ProgramRun(
            id=self.id,
            text=self.prompt if is_text else None,
            ids=None if is_text else tuple(self.prompt),
            gen=self._gen,
            nodes=nodes,
            overlays=tuple(self._overlays),
            start_at=self._start_at,
            stop_at=self._stop_at,
        )
        return run, lines

    def _find(self, name: str) -> Any:
        names = self._session.names
        if name in names:
            return Places(self, name, names[name]) if names[name] else self.place(name)
        raise unknown(name, name, names.keys())

    @contextmanager
    def _inside(self, **changes: Any) -> Iterator[TracedRun]:
        before = self._within
        self._within = before.model_copy(update=changes)
        try:
            yield self
        finally:
            self._within = before


_OWN = frozenset({"id", "record", "prompt", "model"})
