"""Where a program runs: on a hub, or on an engine in this process."""

from __future__ import annotations

import queue
import time
from base64 import b64decode
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeGuard, Unpack

from fabric.errors import PayloadMissing, RequestInvalid
from fabric.messages import (
    EMBED_SAMPLING,
    Event,
    Failed,
    Finished,
    PointManifest,
    Program,
    ProgramInput,
    PromptScored,
    Request,
    Sampling,
    Saves,
    Task,
    TextInput,
    Token,
    TokensInput,
)
from fabric.sdk.programs import (
    OnEvent,
    ProgramOptions,
    ProgramResult,
    ProgramUsage,
    PromptToken,
    Quote,
    RunResult,
    RunToken,
    StepSaves,
)


class Backend(Protocol):
    """What runs programs. ``fabric.sdk.Fabric`` is one."""

    def points(self, model: str | None = None) -> PointManifest:
        """Return where the model may be read and written.

        Raises:
            FabricError: It is not known, or serves no programs.
        """

    def run_program(
        self,
        program: Program,
        *,
        model: str | None = None,
        on_event: OnEvent | None = None,
        **options: Unpack[ProgramOptions],
    ) -> ProgramResult:
        """Run a program to its end.

        Raises:
            FabricError: It was refused, could not be placed, or failed.
        """

    def quote_program(
        self, program: Program, *, model: str | None = None, **options: Unpack[ProgramOptions]
    ) -> Quote:
        """Return what a program would take at most.

        Raises:
            FabricError: It would be refused.
        """

    def tokens(
        self, prompt: str | Sequence[int], *, model: str | None = None
    ) -> tuple[PromptToken, ...]:
        """Return the tokens of a prompt as the model reads them.

        Raises:
            FabricError: The prompt is empty or too long.
        """


class LocalInfo(Protocol):
    """What an engine says of itself."""

    @property
    def model(self) -> str:
        """Its name."""

    @property
    def digest(self) -> str:
        """Of its tensors."""

    @property
    def points(self) -> PointManifest | None:
        """Where programs may read and write."""


class LocalEngine(Protocol):
    """An engine in this process: ``fabric.engine``'s, or anything that takes the same tasks."""

    @property
    def info(self) -> LocalInfo:
        """Facts of the loaded model."""

    def submit(self, task: Task, sink: Callable[[Event], None]) -> None:
        """Queue a task; its events go to the sink."""

    def cancel(self, task_id: str, attempt: int) -> None:
        """End a task."""


class InProcess:
    """Runs programs on an engine of this process, beside whatever else it does.

    Args:
        engine: It has been started; it is not closed here.
    """

    def __init__(self, engine: LocalEngine) -> None:
        self._engine = engine

    def points(self, model: str | None = None) -> PointManifest:  # noqa: ARG002
        """Return where the engine's model may be read and written."""
        manifest = self._engine.info.points
        if manifest is None:
            raise RequestInvalid(
                param="model", value=self._engine.info.model, reason="it serves no programs"
            )
        return manifest

    def run_program(
        self,
        program: Program,
        *,
        model: str | None = None,  # noqa: ARG002
        on_event: OnEvent | None = None,
        **options: Unpack[ProgramOptions],
    ) -> ProgramResult:
        """Run a program to its end."""
        request = Request(
            mode="program",
            model=self._engine.info.model,
            input=ProgramInput(program=program),
            sampling=EMBED_SAMPLING,
            deadline_s=options.get("deadline_s") or 3600.0,
        )
        begun_s = time.perf_counter()
        gathered = Gathered(program, on_event)
        usage = ProgramUsage()
        for event in self._ask(request):
            if isinstance(event, Finished):
                usage = ProgramUsage(
                    prompt_tokens=event.usage.prompt_tokens,
                    completion_tokens=event.usage.output_tokens,
                    hook_bytes_in=event.usage.hook_bytes_in,
                    hook_bytes_out=event.usage.hook_bytes_out,
                    device_s=event.usage.device_s,
                )
            gathered.take(event)
        return ProgramResult(
            runs=gathered.runs(),
            usage=usage,
            model=self._engine.info.model,
            digest=self._engine.info.digest,
            total_s=time.perf_counter() - begun_s,
            run_id=request.id,
        )

    def quote_program(
        self,
        program: Program,
        *,
        model: str | None = None,
        **options: Unpack[ProgramOptions],  # noqa: ARG002
    ) -> Quote:
        """Return what a program would take at most; here it costs nothing."""
        from fabric.programs import check, read_constants, read_header

        manifest = self.points(model)
        constants = read_constants(program)
        checked = check(program, manifest, {} if constants is None else read_header(constants))
        return Quote(
            model=manifest.model,
            digest=manifest.digest,
            num_flops=checked.num_flops,
            result_bytes=checked.result_bytes,
            hook_bytes_in=checked.hook_bytes_in,
            num_prompt_tokens=sum(len(run.ids or run.text or "") for run in program.runs),
            scopes=tuple(sorted(f"program:{scope}" for scope in checked.scopes)),
            charge_usu_max=0,
            device_s_max=program.limits.device_s,
        )

    def tokens(
        self,
        prompt: str | Sequence[int],
        *,
        model: str | None = None,  # noqa: ARG002
    ) -> tuple[PromptToken, ...]:
        """Return the tokens of a prompt as the engine's model reads them."""
        is_text = isinstance(prompt, str)
        request = Request(
            model=self._engine.info.model,
            input=TextInput(text=prompt) if is_text else TokensInput(ids=tuple(prompt)),
            sampling=Sampling(max_tokens=0, prompt_logprobs=True, temperature=0.0),
        )
        return tuple(
            PromptToken(id=token.token_id, text=token.text)
            for event in self._ask(request)
            if isinstance(event, PromptScored)
            for token in event.tokens
        )

    def _ask(self, request: Request) -> Iterator[Event]:
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        task = Task(
            id=request.id,
            attempt=1,
            request=request,
            digest=self._engine.info.digest,
            deadline_s=request.deadline_s,
        )
        self._engine.submit(task, events.put)
        over = False
        try:
            while not over:
                event = events.get()
                over = isinstance(event, Finished | Failed)
                if isinstance(event, Failed):
                    raise event.failure.to_error()
                yield event
        finally:
            if not over:
                self._engine.cancel(task.id, task.attempt)


class Gathered:
    """The results of a program's runs, from the events of its task.

    Args:
        program: It.
        on_event: Is told of tokens and of steps' saves as they arrive.
    """

    def __init__(self, program: Program, on_event: OnEvent | None) -> None:
        self._ids = [run.id for run in program.runs]
        self._on_event = on_event
        self._steps: defaultdict[str, list[StepSaves]] = defaultdict(list)
        self._rest: dict[str, Saves] = {}
        self._tokens: defaultdict[str, list[Token]] = defaultdict(list)

    def take(self, event: Event) -> None:
        """Keep what an event says."""
        told: StepSaves | RunToken | None = None
        if isinstance(event, Token):
            run = self._ids[event.choice]
            self._tokens[run].append(event)
            told = RunToken(run=run, token_id=event.token_id, text=event.text)
        elif isinstance(event, Saves):
            if event.step is None:
                self._rest[event.run] = event
                return
            told = StepSaves(
                run=event.run, step=event.step, names=event.names, data=_data_of(event)
            )
            self._steps[event.run].append(told)
        if told and self._on_event:
            self._on_event(told)

    def runs(self) -> tuple[RunResult, ...]:
        """Return what each run gave."""
        return tuple(self._run(id) for id in self._ids)

    def _run(self, id: str) -> RunResult:
        rest, tokens = self._rest.get(id), self._tokens[id]
        streamed = [name for step in self._steps[id] for name in step.names]
        names = dict.fromkeys((*(rest.names if rest else ()), *streamed))
        return RunResult(
            id=id,
            names=tuple(names),
            data=_data_of(rest) if rest else b"",
            steps=tuple(self._steps[id]),
            tokens=tuple(token.token_id for token in tokens),
            text="".join(token.text for token in tokens),
            finish_reason=tokens[-1].finish_reason if tokens else None,
        )


def _data_of(saves: Saves) -> bytes:
    """Return the file of saves: inline, or where ``fabric.engine.local`` has put it."""
    if saves.data is not None:
        return b64decode(saves.data)
    path = (saves.handle or {}).get("path")
    if not isinstance(path, str):
        raise PayloadMissing(
            store="this process",
            key=str(saves.handle),
            reason="the engine keeps large results elsewhere; start it with local_engine",
        )
    file = Path(path)
    data = file.read_bytes()
    file.unlink()
    return data


def is_engine(it: object) -> TypeGuard[LocalEngine]:
    """Whether it takes tasks."""
    return hasattr(it, "submit") and hasattr(it, "info")
