"""The one continuous batch: takes tasks, runs steps, tells each task's sink what happens."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from logging import getLogger

from fabric.engine.blocks import CacheBlocks
from fabric.engine.config import EngineConfig
from fabric.engine.costs import StepCosts
from fabric.engine.drafts import Drafter
from fabric.engine.intake import Intake
from fabric.engine.interface import EventSink
from fabric.engine.programs.gathering import Gathering
from fabric.engine.programs.programs import Programs
from fabric.engine.reports import Reports
from fabric.engine.rows import ActiveTask
from fabric.engine.runner import Runner
from fabric.engine.scheduler import Run, Scheduler
from fabric.engine.speculation import Speculator
from fabric.engine.step import Chosen, Outcome, run_step
from fabric.errors import (
    DeadlineExceeded,
    EngineError,
    FabricError,
    RankLost,
    RequestCancelled,
    RequestInvalid,
    RowFailed,
)
from fabric.messages import Event, Load, ProgramInput, StepTimes, Task

_logger = getLogger(__name__)

_RATE_MEMORY = 0.9
"""How much of the past a rate keeps at each step."""

_UNSHARED_S = 0.05
"""How long a run without a batch goes on where no row waits; then new tasks are looked at."""


class Batch:
    """All tasks of an engine. Not thread-safe: everything happens on the engine's thread.

    Args:
        runner: The model over its cache.
        intake: Makes tasks ready to run.
        reports: Makes their events.
        config: Row and step limits.
        drafter: Guesses tokens; ``None``: nothing is guessed.
        programs: Runs intervention programs; ``None``: none can be run.
    """

    def __init__(
        self,
        runner: Runner,
        intake: Intake,
        reports: Reports,
        config: EngineConfig,
        drafter: Drafter | None = None,
        programs: Programs | None = None,
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
        self._speculator = drafter and Speculator(drafter, self._scheduler, self._costs)
        self._slowdown = config.slowdown
        self._programs = programs
        self._gathering = Gathering(runner)
        if programs is not None:
            programs.attach(self._scheduler, tell)
        self._prefill, self._decode = _Rate(), _Rate()
        self._busy_s = 0.0
        self._steps = {"prefill": StepTimes(), "decode": StepTimes(), "mixed": StepTimes()}

    @property
    def busy(self) -> bool:
        """Whether there is a task to step for."""
        return bool(self._tasks) or (self._programs is not None and self._programs.busy)

    def load(self) -> Load:
        """Return how busy the batch is."""
        return Load(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            cache_usage=self._scheduler.cache_usage,
            num_preempted=self._scheduler.num_preempted,
            prefix_queried_tokens=self._blocks.num_queried_tokens,
            prefix_found_tokens=self._blocks.num_found_tokens,
            drafted_tokens=self._speculator.num_drafted if self._speculator else 0,
            accepted_tokens=self._speculator.num_accepted if self._speculator else 0,
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
            if isinstance(task.request.input, ProgramInput):
                self._add_program(task, sink, received_at)
                return
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
        elif self._programs is not None:
            self._programs.cancel((task_id, attempt), RequestCancelled())
            self._wipe_suspect()

    def fail_all(self, error: FabricError) -> None:
        """End every task with ``error``."""
        if self._programs is not None:
            self._programs.fail_all(error)
        for active in self._scheduler:
            self._fail(active, error)

    def _add_program(self, task: Task, sink: EventSink, received_at: float) -> None:
        if self._programs is None:
            mode = task.request.mode
            reason = "this instance runs no programs"
            raise RequestInvalid(param="mode", value=mode, reason=reason)
        self._programs.add(task, sink, received_at=received_at)

    def step(self) -> None:
        """Run the rows that are due once. Errors end their own task, or those of the step."""
        self._drop_overdue()
        if self._programs is not None:
            self._busy_s += self._programs.run_alone(self._spare_s)
        runs = self._scheduler.plan(time.monotonic())
        self._wipe_suspect()
        if not runs:
            return
        involved = list(dict.fromkeys(run.row.active for run in runs))
        started = time.perf_counter()
        try:
            if self._speculator:
                runs = self._speculator.extend(runs)
            model_started = time.perf_counter()
            outcome = run_step(runs, self._runner, self._scheduler, self._gathering)
        except RankLost:
            raise  # no further step is possible
        except Exception as error:
            _logger.exception("a step failed", extra={"num_runs": len(runs)})
            for active in involved:
                self._fail(active, _step_error(error))
            return
        ended = time.perf_counter()
        self._costs.add(sum(run.num_tokens for run in runs), ended - model_started)
        self._account(runs, outcome, ended - started)
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
        if self._speculator:
            self._review(self._speculator, runs, outcome)

    @property
    def _spare_s(self) -> float:
        """How long running rows may wait between two steps: as long as they do for prefill."""
        if not (num_running := self._scheduler.num_running):
            return _UNSHARED_S
        return (self._slowdown - 1.0) * self._costs.predict(num_running)

    def _review(self, speculator: Speculator, runs: Sequence[Run], outcome: Outcome) -> None:
        """Learn from guesses; what a guess has spoilt is computed again."""
        num_chosen = Counter(c.row for chosen in outcome.chosen.values() for c in chosen)
        for run in runs:
            if run.draft:
                speculator.learn(run, max(0, num_chosen[run.row] - 1))
        for active in {row.active for row in outcome.spoilt if row.finish_reason is None}:
            if (active.task.id, active.task.attempt) in self._tasks:
                self._scheduler.recompute(active)

    def _drop_overdue(self) -> None:
        now = time.monotonic()
        if self._programs is not None:
            self._programs.drop_overdue(now)
        for active in self._scheduler:
            task = active.task
            if active.program is not None:
                continue
            if active.deaf:
                self._fail(active, RequestCancelled())
            elif now - active.received_at >= task.deadline_s:
                error = DeadlineExceeded(deadline_s=task.deadline_s, attempts=task.attempt)
                self._fail(active, error)

    def _account(self, runs: Sequence[Run], outcome: Outcome, seconds: float) -> None:
        total = sum(run.num_tokens for run in runs)
        self._busy_s += seconds
        own_s = {run: run.row.active.program.take_seconds() for run in runs
                 if run.row.active.program is not None}  # fmt: skip
        shared_s = seconds - sum(own_s.values())
        for run in runs:
            usage = run.row.active.usage
            device_s = shared_s * run.num_tokens / total + own_s.get(run, 0.0)
            kv_block_s = len(run.row.blocks) * seconds
            update: dict[str, float] = {
                "device_s": usage.device_s + device_s,
                "kv_block_s": usage.kv_block_s + kv_block_s,
            }
            if run.draft:
                update["drafted_tokens"] = usage.drafted_tokens + len(run.draft)
            run.row.active.usage = usage.model_copy(update=update)
        decoding = [run for run in runs if run.num_own == 1 and run.row.position > 0]
        rows = {run.row for run in decoding}
        num_chosen = sum(c.row in rows for chosen in outcome.chosen.values() for c in chosen)
        self._prefill.add(total - sum(run.num_tokens for run in decoding), seconds)
        self._decode.add(num_chosen, seconds)
        num_decoding = sum(run.num_tokens for run in decoding)
        phase = "decode" if num_decoding == total else "mixed" if num_decoding else "prefill"
        before = self._steps[phase]
        self._steps[phase] = StepTimes(num=before.num + 1, seconds=before.seconds + seconds)

    def _advance(self, active: ActiveTask, chosen: Sequence[Chosen]) -> None:
        if active.program is not None:
            assert self._programs is not None
            self._programs.advance(active, chosen)
            self._wipe_suspect()
            return
        if active.scores and active.prompt_done:
            self._tell(active, self._reports.prompt_scored(active))
            active.scores, active.scored = [], True
        for choice in chosen:
            row = choice.row
            if row.ended:
                continue  # it ended within what was guessed for it
            num_guessed = len(row.tokens) - row.num_cached  # a guess that was right has its keys
            row.num_cached += num_guessed
            text = row.append(choice.token_id)
            active.count_output(num_guessed)
            if row.finish_reason:
                self._scheduler.keep(row)
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
        if active.program is not None:
            assert self._programs is not None
            self._programs.fail(active.program.owner, error)
            self._wipe_suspect()
            return
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
