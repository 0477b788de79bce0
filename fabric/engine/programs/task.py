"""A program as a task of the engine: its runs, what each waits for, what each has saved."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from fabric.engine.interface import EventSink
from fabric.engine.programs.execution import Execution
from fabric.engine.programs.model import RunModel
from fabric.engine.programs.prepare import Prepared
from fabric.engine.programs.values import Value
from fabric.engine.rows import ActiveTask, Row
from fabric.errors import ProgramTooLarge
from fabric.messages import Sampling, Task, Usage
from fabric.messages.program import ProgramRun
from fabric.programs import CheckedRun


@dataclass(slots=True, kw_only=True, eq=False)
class RunProgram:
    """What makes a row of the batch a run of a program."""

    owner: ProgramTask
    index: int
    """Of the run among the program's."""
    execution: Execution
    model: RunModel
    sampling: Sampling
    variant: bytes
    """Of its keys and values from ``execution.first_changed`` on."""

    @property
    def acts(self) -> bool:
        """Whether a step must know that this is no plain row."""
        run = self.execution.run
        partial = run.start_at is not None or run.stop_at is not None
        return bool(run.nodes or self.model.private) or partial

    def name_before(self, before: bytes, positions: range) -> bytes:
        """Return what precedes the name of the block at these positions: with the first one that
        the run changes, a chain of its own begins."""
        first = self.execution.first_changed
        if first is None or first not in positions:
            return before
        return hashlib.blake2b(self.variant, digest_size=len(before), key=before).digest()

    def num_due(self, row: Row, budget: int, *, first: bool) -> int:
        """Return how many tokens of its prompt a step runs; 0 if it has no room for them.

        From the first position on at which nodes act, the prompt runs in one step, whatever the
        budget is, if no other prompt runs in it.
        """
        before = self.execution.first_touched - row.num_cached
        if before > 0:
            return min(before, budget, row.num_remaining)
        return row.num_remaining if first or row.num_remaining <= budget else 0

    def num_wanted(self, row: Row, num_tokens: int) -> int:
        """Return of how many of the last tokens of a chunk logits are wanted."""
        if self.execution.run.stop_at is not None:
            return 0
        wanted = self.execution.num_wanted(row.num_cached, num_tokens)
        return max(wanted, int(num_tokens == row.num_remaining))

    def take_seconds(self) -> float:
        """Return, once, the seconds that its nodes took."""
        return self.execution.take_seconds()


@dataclass(slots=True, kw_only=True, eq=False)
class ProgramTask:
    """A program in the engine; its runs are tasks of the scheduler, one row each."""

    task: Task
    sink: EventSink
    received_at: float
    prepared: Prepared
    waiting: dict[str, CheckedRun]
    """Runs that have not started."""
    running: dict[str, ActiveTask] = field(default_factory=dict)
    alone: list[str] = field(default_factory=list)
    """Runs that are ready and share no batch; the first may be in the middle of its pass."""
    results: dict[str, dict[str, Value]] = field(default_factory=dict)
    """By run that has ended, its saves that other runs may take."""
    finish_reasons: dict[str, str] = field(default_factory=dict)
    used: Usage = field(default_factory=Usage)
    """Of the runs that have ended, and of what the whole program takes."""
    deaf: bool = False
    _digest: str = ""
    """Of the whole program; made when a run first needs it, because it is long."""

    @property
    def usage(self) -> Usage:
        """What it has consumed until now."""
        parts = [self.used, *(active.usage for active in self.running.values())]
        added = {
            name: sum(getattr(part, name) for part in parts)
            for name in ("cached_prompt_tokens", "output_tokens", "device_s")
        }
        return self.used.model_copy(update=added)

    @property
    def device_s(self) -> float:
        """The seconds of ``usage``."""
        running = self.running.values()
        return self.used.device_s + sum(active.usage.device_s for active in running)

    def hold_time(self) -> None:
        """Raise ProgramTooLarge when it has taken more seconds than it may."""
        limit_s = self.prepared.checked.program.limits.device_s
        if (used_s := self.device_s) > limit_s:
            raise ProgramTooLarge(cap="limits.device_s", value=used_s, limit=limit_s)

    @property
    def finished(self) -> bool:
        """Whether every run has ended."""
        return not (self.waiting or self.running or self.alone)

    def take_ready(self) -> Iterator[CheckedRun]:
        """Take the runs whose sources have all ended."""
        for run_id, checked in list(self.waiting.items()):
            if all(other in self.results for other in checked.depends_on):
                del self.waiting[run_id]
                yield checked

    def index_of(self, run_id: str) -> int:
        """Return the place of a run in the program."""
        return next(i for i, run in enumerate(self.runs) if run.id == run_id)

    @property
    def runs(self) -> tuple[ProgramRun, ...]:
        """The runs as the program lists them."""
        return self.prepared.checked.program.runs

    def saved(self, run: str, save: str) -> Tensor:
        """Return what another run saved."""
        return self.results[run][save].data

    def variant(self, run: ProgramRun) -> bytes:
        """Return what names the keys and values that a run changes: all that they depend on."""
        consts = self.prepared.checked.program.consts
        parts = [run.model_dump_json(exclude={"id", "gen", "text", "ids"})]
        parts += [consts.sha256] if consts is not None else []
        # What other runs saved is a function of the whole program.
        if any(checked.depends_on for checked in self.prepared.checked.runs if checked.run is run):
            self._digest = self._digest or self._digest_of_all()
            parts.append(self._digest)
        return hashlib.sha256("\0".join(parts).encode()).digest()

    def _digest_of_all(self) -> str:
        whole = self.prepared.checked.program.model_dump_json()
        return hashlib.sha256(whole.encode()).hexdigest()
