"""The one continuous batch: takes tasks, runs steps, tells each task's sink what happens."""

from __future__ import annotations

import time
from collections.abc import Sequence
from logging import getLogger

from fabric.engine.blocks import CacheBlocks
from fabric.engine.config import EngineConfig
from fabric.engine.costs import StepCosts
from fabric.engine.intake import Intake
from fabric.engine.interface import EventSink
from fabric.engine.reports import Reports
from fabric.engine.rows import ActiveTask
from fabric.engine.runner import Runner
from fabric.engine.scheduler import Run, Scheduler
from fabric.engine.step import Chosen, run_step
from fabric.errors import (
    DeadlineExceeded,
    EngineError,
    FabricError,
    RequestCancelled,
    RequestInvalid,
    RowFailed,
)
from fabric.messages import Event, Load, StepTimes, Task

_logger = getLogger(__name__)

_RATE_MEMORY = 0.9
"""How much of the past a rate keeps at each step."""


class Batch:
    """All tasks of an engine. Not thread-safe: everything happens on the engine's thread.

    Args:
        runner: The model over its cache.
        intake: Makes tasks ready to run.
        reports: Makes their events.
        config: Row and step limits.
    """

    def __init__(
        self, runner: Runner, intake: Intake, reports: Reports, config: EngineConfig
    ) -> None:
        self._runner = runner
        self._intake = intake
        self._reports = reports
        self._tasks: dict[tuple[str, int], ActiveTask] = {}
        self._blocks = CacheBlocks(runner.num_blocks)
        self._costs = StepCosts()
        self._scheduler = Scheduler(
            self._blocks,
            self._costs,
            max_rows=config.max_rows,
            step_tokens=config.step_tokens,
            slowdown=config.slowdown,
        )
        self._prefill, self._decode = _Rate(), _Rate()
        self._busy_s = 0.0
        self._steps = {"prefill": StepTimes(), "decode": StepTimes(), "mixed": StepTimes()}

    @property
    def busy(self) -> bool:
        """Whether there is a task to step for."""
        return bool(self._tasks)

    def load(self) -> Load:
        """Return how busy the batch is."""
        return Load(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            cache_usage=self._scheduler.cache_usage,
            num_preempted=self._scheduler.num_preempted,
            prefix_queried_tokens=self._blocks.num_queried_tokens,
            prefix_found_tokens=self._blocks.num_found_tokens,
            busy_s=self._busy_s,
            step_s=self._costs.predict(self._scheduler.num_running),
            prefill_wait_s=self._costs.predict(self._scheduler.num_due_tokens),
            prefill_tokens_per_s=self._prefill.per_s,
            decode_tokens_per_s=self._decode.per_s,
            prefill_steps=self._steps["prefill"],
            decode_steps=self._steps["decode"],
            mixed_steps=self._steps["mixed"],
        )

    def add(self, task: Task, sink: EventSink, *, received_at: float) -> None:
        """Make a task ready and queue it; what is wrong with it goes to its sink."""
        key = (task.id, task.attempt)
        try:
            if key in self._tasks:
                raise RequestInvalid(
                    param="attempt", value=task.attempt, reason="this attempt is running already"
                )
            active = self._intake.activate(task, sink, received_at=received_at)
        except FabricError as error:
            tell(sink, self._reports.failed(task, error))
            return
        except Exception as error:
            _logger.exception("a task could not be prepared", extra={"task": task.id})
            tell(sink, self._reports.failed(task, _row_error(error)))
            return
        self._tasks[key] = active
        self._scheduler.add(active)
        self._tell(active, self._reports.accepted(active))
        if active.finished:
            self._finish(active)

    def cancel(self, task_id: str, attempt: int) -> None:
        """End a task whose caller wants no more of it; unknown ones are ignored."""
        if active := self._tasks.get((task_id, attempt)):
            self._fail(active, RequestCancelled())

    def fail_all(self, error: FabricError) -> None:
        """End every task with ``error``."""
        for active in self._scheduler:
            self._fail(active, error)

    def step(self) -> None:
        """Run the rows that are due once. Errors end their own task, or those of the step."""
        self._drop_overdue()
        runs = self._scheduler.plan(time.monotonic())
        self._wipe_suspect()
        if not runs:
            return
        involved = list(dict.fromkeys(run.row.active for run in runs))
        started = time.perf_counter()
        try:
            outcome = run_step(runs, self._runner, self._scheduler)
        except Exception as error:
            _logger.exception("a step failed", extra={"num_runs": len(runs)})
            for active in involved:
                self._fail(active, _step_error(error))
            return
        self._account(runs, time.perf_counter() - started)
        for active in involved:
            if active in outcome.failed:
                self._fail(active, outcome.failed[active])
                continue
            try:
                self._advance(active, outcome.chosen.get(active, ()))
            except FabricError as error:
                self._fail(active, error)
            except Exception as error:
                _logger.exception("a row failed", extra={"task": active.task.id})
                self._fail(active, _row_error(error))

    def _drop_overdue(self) -> None:
        now = time.monotonic()
        for active in self._scheduler:
            task = active.task
            if active.deaf:
                self._fail(active, RequestCancelled())
            elif now - active.received_at >= task.deadline_s:
                error = DeadlineExceeded(deadline_s=task.deadline_s, attempts=task.attempt)
                self._fail(active, error)

    def _account(self, runs: Sequence[Run], seconds: float) -> None:
        total = sum(run.num_tokens for run in runs)
        self._costs.add(total, seconds)
        self._busy_s += seconds
        for run in runs:
            usage = run.row.active.usage
            device_s = usage.device_s + seconds * run.num_tokens / total
            run.row.active.usage = usage.model_copy(update={"device_s": device_s})
        decoded = sum(run.num_tokens == 1 and run.row.position > 0 for run in runs)
        self._prefill.add(total - decoded, seconds)
        self._decode.add(decoded, seconds)
        phase = "decode" if decoded == total else "mixed" if decoded else "prefill"
        before = self._steps[phase]
        self._steps[phase] = StepTimes(num=before.num + 1, seconds=before.seconds + seconds)

    def _advance(self, active: ActiveTask, chosen: Sequence[Chosen]) -> None:
        if active.scores and active.prompt_done:
            self._tell(active, self._reports.prompt_scored(active))
            active.scores, active.scored = [], True
        for choice in chosen:
            row = choice.row
            text = row.append(choice.token_id)
            num_output = active.usage.output_tokens + 1
            active.usage = active.usage.model_copy(update={"output_tokens": num_output})
            if row.finish_reason:
                self._scheduler.retire(row)
            self._tell(active, self._reports.token(row, text, choice.score))
        if active.prompt_done and active.embeds:
            self._tell(active, self._reports.embedding(active))
        if active.prompt_done and active.max_tokens == 0:
            active.end_empty()
        if active.finished:
            self._finish(active)

    def _finish(self, active: ActiveTask) -> None:
        self._forget(active)
        self._tell(active, self._reports.finished(active))

    def _fail(self, active: ActiveTask, error: FabricError) -> None:
        self._forget(active, poisoned=isinstance(error, EngineError))
        self._tell(active, self._reports.failed(active.task, error, active.usage))

    def _forget(self, active: ActiveTask, *, poisoned: bool = False) -> None:
        del self._tasks[active.task.id, active.task.attempt]
        self._scheduler.remove(active, poisoned=poisoned)
        self._wipe_suspect()

    def _wipe_suspect(self) -> None:
        # A masked NaN that is left behind would still spoil another row's attention.
        if suspect := self._scheduler.take_suspect():
            self._runner.cache.wipe(suspect)

    def _tell(self, active: ActiveTask, event: Event) -> None:
        active.deaf = not tell(active.sink, event) or active.deaf


def tell(sink: EventSink, event: Event) -> bool:
    """Give a sink its event; say whether it took it. A sink that raises harms only its task."""
    try:
        sink(event)
    except Exception:
        _logger.exception("a sink failed", extra={"task": event.task_id})
        return False
    return True


def _row_error(error: Exception) -> RowFailed:
    return RowFailed(reason=f"{type(error).__name__}: {error}")


def _step_error(error: Exception) -> EngineError:
    return EngineError(
        f"The engine's step failed ({type(error).__name__}: {error}); the requests in it ended, and"
        " the instance goes on. Send the request again, and report this if it stays.",
        cause=type(error).__name__,
    )


class _Rate:
    """Tokens per second, weighted exponentially towards the last steps."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0

    @property
    def per_s(self) -> float:
        return self._tokens / self._seconds if self._seconds else 0.0

    def add(self, num_tokens: int, seconds: float) -> None:
        if num_tokens:
            self._tokens = _RATE_MEMORY * self._tokens + num_tokens
            self._seconds = _RATE_MEMORY * self._seconds + seconds
