"""The programs of a batch: their runs become rows, what the rows save becomes events."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from logging import getLogger
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fabric.engine.blocks import PrefixKey
from fabric.engine.interface import EventSink
from fabric.engine.programs.aside import Aside
from fabric.engine.programs.execution import Execution, Sources
from fabric.engine.programs.gradient import GradientLane
from fabric.engine.programs.model import RunModel, Weights
from fabric.engine.programs.points import Points
from fabric.engine.programs.prepare import Preparer
from fabric.engine.programs.results import Keep, saves_event
from fabric.engine.programs.task import ProgramTask, RunProgram
from fabric.engine.programs.values import Value
from fabric.engine.reports import Reports
from fabric.engine.rows import ActiveTask, Row
from fabric.engine.runner import Runner
from fabric.engine.scheduler import Scheduler
from fabric.engine.text import Texts, TextStream
from fabric.errors import (
    DeadlineExceeded,
    FabricError,
    ProgramFailed,
    ProgramInvalid,
    ProgramTooLarge,
    RequestCancelled,
    RequestInvalid,
)
from fabric.messages import Event, Finished, ProgramInput, Sampling, Task, Usage
from fabric.messages import nodes as ops
from fabric.messages.program import ProgramRun
from fabric.programs import CheckedRun

if TYPE_CHECKING:
    from fabric.engine.step import Chosen

_logger = getLogger(__name__)

Tell = Callable[[EventSink, Event], bool]


@dataclass(slots=True, kw_only=True)
class _Alone:
    """A run that shares no batch, in the middle of its pass."""

    owner: ProgramTask
    run: ProgramRun
    aside: Aside
    execution: Execution | None = None


class Programs:
    """All programs of an engine; everything happens on its thread.

    Args:
        preparer: Checks them.
        runner: The model over its cache.
        weights: The model's parameters.
        texts: The model's tokenizer.
        reports: Makes events.
        prefix_key: Of the engine's prefixes.
        eos_ids: Tokens that end a run, unless it ignores them.
        keep: Where results go that are too large to be sent.
    """

    def __init__(
        self,
        preparer: Preparer,
        runner: Runner,
        weights: Weights,
        texts: Texts,
        reports: Reports,
        *,
        prefix_key: PrefixKey,
        eos_ids: frozenset[int],
        keep: Keep | None = None,
    ) -> None:
        self._preparer, self._runner, self._weights = preparer, runner, weights
        self._texts, self._reports, self._keep = texts, reports, keep
        self._eos_ids = eos_ids
        self._gradients = GradientLane(weights)
        self._alone: _Alone | None = None
        self._prefix_key = prefix_key
        self._tasks: dict[tuple[str, int], ProgramTask] = {}

    def attach(self, scheduler: Scheduler, tell: Tell) -> None:
        """Work with a batch: its queue, and how it tells a sink its event."""
        self._scheduler, self._tell = scheduler, tell

    @property
    def busy(self) -> bool:
        """Whether there is a program."""
        return bool(self._tasks)

    def add(self, task: Task, sink: EventSink, *, received_at: float) -> None:
        """Check a program and start what can start.

        Raises:
            FabricError: It cannot run.
        """
        key = (task.id, task.attempt)
        if key in self._tasks:
            raise RequestInvalid(
                param="attempt", value=task.attempt, reason="this attempt is running already"
            )
        assert isinstance(task.request.input, ProgramInput)
        program = task.request.input.program
        prepared = self._preparer.prepare(program, task=task)
        num_prompt = sum(len(run.run.ids or ()) for run in prepared.checked.runs)
        owner = ProgramTask(
            task=task,
            sink=sink,
            received_at=received_at,
            prepared=prepared,
            waiting={run.run.id: run for run in prepared.checked.runs},
            used=Usage(prompt_tokens=num_prompt, hook_bytes_in=prepared.checked.hook_bytes_in),
        )
        self._tasks[key] = owner
        self._say(owner, self._reports.accepted_program(task, num_prompt))
        self._guard(owner, partial(self._start_ready, owner))

    def cancel(self, key: tuple[str, int], error: FabricError) -> None:
        """End a program that is wanted no more; unknown ones are ignored."""
        if owner := self._tasks.get(key):
            self.fail(owner, error)

    def fail_all(self, error: FabricError) -> None:
        """End every program with ``error``."""
        for owner in list(self._tasks.values()):
            self.fail(owner, error)

    def drop_overdue(self, now: float) -> None:
        """End programs whose deadline has passed or whose sink is gone."""
        for owner in list(self._tasks.values()):
            task = owner.task
            if owner.deaf:
                self.fail(owner, RequestCancelled())
            elif now - owner.received_at >= task.deadline_s:
                self.fail(
                    owner, DeadlineExceeded(deadline_s=task.deadline_s, attempts=task.attempt)
                )

    def fail(self, owner: ProgramTask, error: FabricError) -> None:
        """End a program; what its runs computed is found by nobody."""
        if self._tasks.pop((owner.task.id, owner.task.attempt), None) is None:
            return
        usage = owner.usage
        if self._alone is not None and self._alone.owner is owner:
            self._alone.aside.abandon()
            self._alone = None
        for active in owner.running.values():
            self._scheduler.remove(active, poisoned=True)
        owner.running.clear()
        self._say(owner, self._reports.failed(owner.task, error, usage))

    def advance(self, active: ActiveTask, chosen: Sequence[Chosen]) -> None:
        """Take what a step gave a run: its token, what it streams, its end."""
        program = active.program
        assert program is not None
        owner = program.owner
        if (owner.task.id, owner.task.attempt) in self._tasks:
            self._guard(owner, partial(self._advance, owner, program, active, chosen))

    def run_alone(self, seconds: float) -> float:
        """Let a run that shares no batch go on for about ``seconds``, if there is one; return how
        many it took."""
        if self._alone is None:
            owner = next((owner for owner in self._tasks.values() if owner.alone), None)
            if owner is None:
                return 0.0
            self._alone = self._begin_alone(owner)
        owner = self._alone.owner
        before_s = owner.used.device_s
        self._guard(owner, partial(self._go_on, self._alone, seconds))
        return owner.used.device_s - before_s

    def _advance(
        self, owner: ProgramTask, program: RunProgram, active: ActiveTask, chosen: Sequence[Chosen]
    ) -> None:
        execution, row = program.execution, active.rows[0]
        for step, saves in execution.take_streamed():
            self._send(owner, execution.run, saves, step=step)
        for choice in chosen:
            if row.position < len(execution.told):
                row.tokens.append(choice.token_id)  # It starts over: this one was told before.
                continue
            text = row.append(choice.token_id)
            execution.told.append(choice.token_id)
            num_output = active.usage.output_tokens + 1
            active.usage = active.usage.model_copy(update={"output_tokens": num_output})
            if row.finish_reason:
                self._scheduler.retire(row)
            self._say(owner, self._reports.token(row, text, choice.score))
        if active is next(iter(owner.running.values())):
            owner.hold_time()
        if active.prompt_done and active.max_tokens == 0:
            active.end_empty()
        if active.finished:
            self._scheduler.remove(active)
            del owner.running[execution.run.id]
            self._take_usage(owner, active.usage)
            self._end_run(owner, execution, row.finish_reason or "length")

    def _end_run(self, owner: ProgramTask, execution: Execution, reason: str) -> None:
        run_id = execution.run.id
        with torch.inference_mode():
            saves = execution.results(streamed=False)
            wanted = any(run_id in checked.depends_on for checked in owner.waiting.values())
            owner.results[run_id] = execution.results(streamed=True) if wanted else {}
        owner.finish_reasons[run_id] = reason
        if saves:
            self._send(owner, execution.run, saves)
        self._start_ready(owner)
        if owner.finished:
            del self._tasks[owner.task.id, owner.task.attempt]
            task, ends = owner.task, owner.finish_reasons
            reasons = tuple(ends[run.id] for run in owner.runs)
            self._say(
                owner,
                Finished(
                    task_id=task.id,
                    attempt=task.attempt,
                    finish_reasons=reasons,
                    usage=owner.usage,
                ),
            )

    def _start_ready(self, owner: ProgramTask) -> None:
        for checked in owner.take_ready():
            if _has_gradients(checked):
                owner.alone.append(checked.run.id)
            else:
                active = self._activate(owner, checked)
                owner.running[checked.run.id] = active
                self._scheduler.add(active)

    def _activate(self, owner: ProgramTask, checked: CheckedRun) -> ActiveTask:
        """Return a run as a task of the scheduler with one row, nothing of it run."""
        run, task = checked.run, owner.task
        points = self._runner.points
        assert points is not None
        model = RunModel(
            self._runner.model,
            points.anatomy,
            self._weights,
            self._runner.lowrank,
            overlays=run.overlays,
            constants=owner.prepared.constants,
        )
        sampling = Sampling(
            max_tokens=run.gen.max_tokens,
            temperature=run.gen.temperature,
            seed=run.gen.seed,
            ignore_eos=run.gen.ignore_eos,
        )
        # A run with weights of its own is asked for them in every step.
        hooked = frozenset[str]() if model.private else points.hooked
        program = RunProgram(
            owner=owner,
            index=owner.index_of(run.id),
            execution=self._execution(owner, checked, model, hooked=hooked),
            model=model,
            sampling=sampling,
            variant=owner.variant(run),
        )
        prompt = list(run.ids or ())
        active = ActiveTask(
            task=task,
            sink=owner.sink,
            prompt=prompt,
            max_tokens=run.gen.max_tokens,
            end_ids=frozenset() if run.gen.ignore_eos else self._eos_ids,
            seed=run.gen.seed,
            received_at=owner.received_at,
            prefix_start=self._prefix_key.start(task.cache_salt or f"{task.id}#{task.attempt}"),
            deltas=model.deltas,
            forked=True,
            program=program,
        )
        stream = TextStream(self._texts, ())
        active.rows = [Row(active=active, choice=program.index, tokens=list(prompt), stream=stream)]
        return active

    def _execution(
        self,
        owner: ProgramTask,
        checked: CheckedRun,
        model: RunModel,
        *,
        hooked: frozenset[str] = frozenset(),
    ) -> Execution:
        constants = owner.prepared.constants
        run = checked.run
        entry = None if run.start_at is None else _entry(run.start_at.x, checked, owner)
        return Execution(
            run,
            Sources(
                constants=constants, saved=owner.saved, artifact=_no_artifact, model=model,
                entry=entry,
            ),
            max_bytes=owner.prepared.checked.program.limits.result_bytes,
            single=frozenset(k for k, node in enumerate(checked.nodes) if node.num_steps <= 1),
            hooked=hooked,
        )  # fmt: skip

    def _begin_alone(self, owner: ProgramTask) -> _Alone:
        checked = next(c for c in owner.prepared.checked.runs if c.run.id == owner.alone[0])

        def make(points: Points) -> tuple[Execution, RunModel]:
            model = RunModel(
                self._weights.plain,
                points.anatomy,
                self._weights,
                None,
                overlays=checked.run.overlays,
                constants=owner.prepared.constants,
            )
            alone.execution = self._execution(owner, checked, model)
            return alone.execution, model

        alone = _Alone(owner=owner, run=checked.run, aside=self._gradients.begin(make))
        return alone

    def _go_on(self, alone: _Alone, seconds: float) -> None:
        owner, started = alone.owner, time.perf_counter()
        try:
            over = alone.aside.go_on(seconds)
        finally:
            self._take_usage(owner, Usage(device_s=time.perf_counter() - started))
        owner.hold_time()
        if not over:
            return
        assert alone.execution is not None
        self._alone = None
        owner.alone.remove(alone.run.id)
        for step, saves in alone.execution.take_streamed():
            self._send(owner, alone.run, saves, step=step)
        self._end_run(owner, alone.execution, "length")

    def _send(
        self,
        owner: ProgramTask,
        run: ProgramRun,
        saves: dict[str, Value],
        *,
        step: int | None = None,
    ) -> None:
        event = saves_event(owner.task, run.id, saves, self._keep, step=step)
        num_bytes = owner.used.hook_bytes_out + event.size
        limit = owner.prepared.checked.program.limits.result_bytes
        if num_bytes > limit:
            raise ProgramTooLarge(cap="limits.result_bytes", value=num_bytes, limit=limit)
        owner.used = owner.used.model_copy(update={"hook_bytes_out": num_bytes})
        self._say(owner, event)

    @staticmethod
    def _take_usage(owner: ProgramTask, usage: Usage) -> None:
        names = ("cached_prompt_tokens", "output_tokens", "device_s")
        added = {name: getattr(owner.used, name) + getattr(usage, name) for name in names}
        queue_s = owner.used.queue_s or usage.queue_s
        owner.used = owner.used.model_copy(update=added | {"queue_s": queue_s})

    def _guard(self, owner: ProgramTask, action: Callable[[], None]) -> None:
        """Do something for a program; what goes wrong ends that program alone."""
        try:
            action()
        except FabricError as error:
            self.fail(owner, error)
        except Exception as error:
            _logger.exception("a program failed", extra={"task": owner.task.id})
            self.fail(owner, ProgramFailed(reason=f"{type(error).__name__}: {error}"))

    def _say(self, owner: ProgramTask, event: Event) -> None:
        owner.deaf = not self._tell(owner.sink, event) or owner.deaf


def _has_gradients(checked: CheckedRun) -> bool:
    return any(isinstance(node, ops.Grad) for node in checked.run.nodes)


def _entry(name: str, checked: CheckedRun, owner: ProgramTask) -> Tensor:
    """Return the hidden states with which a run enters the stack, [positions, hidden]."""
    if name in owner.prepared.constants:
        return owner.prepared.constants[name]
    for run_id in checked.depends_on:
        save = name.removeprefix(f"{run_id}/")
        if save != name and save in owner.results[run_id]:
            return owner.results[run_id][save].data
    raise ProgramInvalid(run=checked.run.id, reason=f"there is no {name!r} to start with")


def _no_artifact(node: ops.Artifact) -> Tensor:
    raise ProgramInvalid(
        reason=f"the artifact {node.id!r} is stored elsewhere; whoever sends the program here puts"
        " it among the constants"
    )
