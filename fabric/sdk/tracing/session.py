"""Traces: blocks whose lines become a program, which runs when the block is over."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence, Set
from functools import cached_property
from hashlib import sha256
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack

from pydantic import ValidationError

from fabric.errors import FabricError, PointRefused, PointUnknown, ProgramInvalid
from fabric.messages import PointManifest, Program
from fabric.messages.nodes import Artifact
from fabric.messages.program import MAX_RUNS, Constants, Generate, ProgramLimits
from fabric.sdk.programs import OnEvent, ProgramOptions, ProgramResult, Quote
from fabric.sdk.tracing.backend import Backend, InProcess, LocalEngine, is_engine
from fabric.sdk.tracing.lines import Line, refuse
from fabric.sdk.tracing.record import Order
from fabric.sdk.tracing.run import Prompt, TracedRun
from fabric.sdk.tracing.status import Status
from fabric.sdk.tracing.sweep import Grid

if TYPE_CHECKING:
    from fabric.sdk.arrays import Array

Target = str | Backend | LocalEngine | None
"""A model's name, what runs programs, or an engine of this process."""

DEVICE_S = 600.0
"""What a trace may take where it says nothing: slow machines are slow; the tier's cap holds too."""

RunT = TypeVar("RunT", bound=TracedRun)


class Session:
    """Several runs of one model that may read each other's values, as one program.

    Args:
        target: ``name@revision``, an engine in this process, or (with ``backend``) both.
        backend: What runs it; a client with the settings' hub by default.
        on_event: Is told of tokens and of streamed saves as they arrive.
        limits: What the program may take.
        dry_run: Only record: ``program`` is there and nothing is run.
        **options: See ``ProgramOptions``.
    """

    def __init__(
        self,
        target: Target = None,
        *,
        backend: Backend | LocalEngine | None = None,
        on_event: OnEvent | None = None,
        limits: ProgramLimits | None = None,
        dry_run: bool = False,
        **options: Unpack[ProgramOptions],
    ) -> None:
        is_name = isinstance(target, str) or target is None
        self.model: str | None = target if isinstance(target, str) else None
        self.result: ProgramResult | None = None
        self._given = backend if is_name else target
        self._on_event = on_event
        self._limits = limits or ProgramLimits(device_s=DEVICE_S)
        self._dry_run = dry_run
        self._options = options
        self._runs: dict[str, TracedRun] = {}
        self._constants: dict[str, Array] = {}

    def run(
        self,
        prompt: Prompt,
        *,
        id: str | None = None,
        max_tokens: int = 0,
        temperature: float = 0.0,
        seed: int = 0,
        ignore_eos: bool = True,
    ) -> TracedRun:
        """Add a run.

        Args:
            prompt: A text, or token ids.
            id: Its name in the program.
            max_tokens: How many tokens it generates.
            temperature: 0 is greedy.
            seed: Of the sampling.
            ignore_eos: Go on behind an end-of-sequence token.

        Raises:
            TraceError: Something of that cannot be sent, or there are too many runs.
        """
        gen = _generate(max_tokens, temperature, seed, ignore_eos)
        return self.add_run(TracedRun(self, id or f"run{len(self._runs)}", prompt, gen))

    def add_run(self, run: RunT) -> RunT:
        """Add a run that was made already.

        Raises:
            TraceError: There are too many runs, or two of a name, or the prompt is empty.
        """
        id, prompt = run.id, run.prompt
        if id in self._runs:
            raise refuse(f"There is a run {id!r} already; each has its own name.")
        if len(self._runs) == MAX_RUNS:
            raise refuse(f"A program has at most {MAX_RUNS} runs; make several sessions of these.")
        if len(prompt) == 0:
            raise refuse("The prompt is empty.")
        self._runs[id] = run
        return run

    def sweep(self, prompt: Prompt, *, id: str = "sweep", **axes: Sequence[Any]) -> Grid:
        """Add a run for every combination of some axes' entries; see ``Grid``."""
        return Grid(self, prompt, id, axes)

    @property
    def program(self) -> Program:
        """The program as recorded so far.

        Raises:
            TraceError: A line does not compile.
        """
        return self._compile()[0]

    def quote(self) -> Quote:
        """Return what the program recorded so far would take at most.

        Raises:
            FabricError: It would be refused.
        """
        return self._backend.quote_program(self.program, model=self.model, **self._options)

    @property
    def done(self) -> ProgramResult:
        """The result.

        Raises:
            TraceError: The trace is not over, or has failed.
        """
        if self.result is None:
            raise refuse("There is no result yet: it comes when the `with` block is over.")
        return self.result

    @cached_property
    def manifest(self) -> PointManifest:
        """Where the model may be read and written."""
        return self._backend.points(self.model)

    @cached_property
    def names(self) -> Mapping[str, Set[str]]:
        """The points below each first name; those of layers without the layer."""
        names: dict[str, set[str]] = {}
        for spec in self.manifest.points:
            head, _, rest = spec.pattern.replace(".{i}", "").partition(".")
            names.setdefault(head, set()).update({rest} - {""})
        return names

    def add_constant(self, array: Array) -> str:
        """Keep an array for the program and return its name; equal ones are kept once."""
        content = sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes())
        name = f"c_{content.hexdigest()[:16]}"
        self._constants.setdefault(name, array)
        return name

    def tokens(self, prompt: Prompt) -> tuple[Any, ...]:
        """Return the tokens of a prompt, each with ``id`` and ``text``."""
        return self._backend.tokens(prompt, model=self.model)

    def execute(self) -> ProgramResult:
        """Run what was recorded; leaving the block does it, if it was not done before.

        Raises:
            TraceError: A line does not compile.
            FabricError: The program was refused, could not be placed, or failed.
        """
        program, lines = self._compile()
        with Status(program) as status:
            try:
                self.result = self._backend.run_program(
                    program,
                    model=self.model,
                    on_event=status.watch(self._on_event),
                    **self._options,
                )
            except FabricError as error:
                raise _at_its_line(error, lines) from None
            status.end(self.result.summary)
        for run in self._runs.values():
            run.record.close()
        return self.result

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None and not self._dry_run and self.result is None:
                self.execute()
        finally:
            self._close()

    @cached_property
    def _backend(self) -> Backend:
        if self._given is None:
            from fabric.sdk.client import Fabric

            return Fabric()
        return InProcess(self._given) if is_engine(self._given) else self._given  # type: ignore[return-value]

    def _close(self) -> None:
        close = getattr(self.__dict__.get("_backend"), "close", None)
        if self._given is None and close is not None:
            close()

    def _compile(self) -> tuple[Program, Mapping[str, tuple[Line, ...]]]:
        from fabric.programs import check, read_header

        if not self._runs:
            raise refuse("The session has no runs; add one with `.run(prompt)`.")
        order = self._order()
        try:
            compiled = [run.compile(order) for run in self._runs.values()]
        except ValidationError as error:
            raise refuse(f"A run cannot be sent: {error.errors()[0]['msg']}.") from None
        lines = {run.id: where for run, where in compiled}
        data = self._write_constants()
        program = Program(
            runs=tuple(run for run, _ in compiled),
            consts=None if data is None else _constants(data),
            limits=self._limits,
        )
        if any(isinstance(node, Artifact) for run in program.runs for node in run.nodes):
            return program, lines  # only the hub knows their shapes
        try:
            check(program, self.manifest, {} if data is None else read_header(data))
        except FabricError as error:
            raise _at_its_line(error, lines) from None
        return program, lines

    def _write_constants(self) -> bytes | None:
        if not self._constants:
            return None
        from fabric.sdk.arrays import write_tensors

        return write_tensors(self._constants)

    def _order(self) -> Order:
        from fabric.programs import order_of

        known: dict[str, int] = {}

        def order(point: str) -> int:
            if point not in known:
                known[point] = order_of(self.manifest, point)
            return known[point]

        return order


class Trace(TracedRun):
    """A run that is a whole session: what ``with fabric.trace(...) as t`` gives."""

    def __exit__(self, *exception: Any) -> None:
        self._session.__exit__(*exception)


def session(
    target: Target = None,
    *,
    backend: Backend | LocalEngine | None = None,
    on_event: OnEvent | None = None,
    limits: ProgramLimits | None = None,
    dry_run: bool = False,
    **options: Unpack[ProgramOptions],
) -> Session:
    """Begin a program of several runs; see ``Session`` for the arguments.

    ::

        with fabric.session("model@revision") as s:
            clean = s.run("The capital of France is")
            corrupt = s.run("The capital of Spain is")
            corrupt.layers[5].out[3] = clean.layers[5].out[3]
            patched = corrupt.logits[-1].save()
    """
    return Session(
        target,
        backend=backend,
        on_event=on_event,
        limits=limits,
        dry_run=dry_run,
        **options,
    )


def trace(
    target: Target,
    prompt: Prompt,
    *,
    max_tokens: int = 0,
    temperature: float = 0.0,
    seed: int = 0,
    ignore_eos: bool = True,
    backend: Backend | LocalEngine | None = None,
    on_event: OnEvent | None = None,
    limits: ProgramLimits | None = None,
    dry_run: bool = False,
    **options: Unpack[ProgramOptions],
) -> Trace:
    """Begin a program of one run; see ``Session`` and ``Session.run`` for the arguments.

    ::

        with fabric.trace("model@revision", "The Eiffel Tower is in") as t:
            h = t.layers[5].attn.out.save()
        print(h.value)
    """
    whole = Session(
        target,
        backend=backend,
        on_event=on_event,
        limits=limits,
        dry_run=dry_run,
        **options,
    )
    gen = _generate(max_tokens, temperature, seed, ignore_eos)
    return whole.add_run(Trace(whole, "run0", prompt, gen))


def _generate(max_tokens: int, temperature: float, seed: int, ignore_eos: bool) -> Generate:
    try:
        return Generate(
            max_tokens=max_tokens, temperature=temperature, seed=seed, ignore_eos=ignore_eos
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise refuse(f"{first['loc'][0]}: {first['msg']}.") from None


def _constants(data: bytes) -> Constants:
    return Constants(sha256=sha256(data).hexdigest(), size=len(data), data=b64encode(data).decode())


def _at_its_line(error: FabricError, lines: Mapping[str, Sequence[Line]]) -> FabricError:
    """Return the error of the line whose node cannot be sent; others get a note of their line."""
    run, node = error.detail.get("run"), error.detail.get("node")
    where = lines.get(run, ()) if isinstance(run, str) else ()
    if not isinstance(node, int) or not 0 <= node < len(where):
        return error
    line = where[node]
    if isinstance(error, ProgramInvalid):
        return line.error(f"This cannot be sent: {error.detail['reason']}.")
    if isinstance(error, PointUnknown | PointRefused):
        return line.error(error.message)
    error.add_note(f"{line.file}, line {line.number}: `{line.text}`")
    return error
