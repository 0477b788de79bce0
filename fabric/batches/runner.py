"""The runner: reads the batches of a hub, asks their lines, and makes files of what came back.

A line is asked when the model has rows to spare, so that batches use what others leave. Its result
is written in the transaction of its charge: a hub that is killed has either both or neither, and
the next one asks what has no result.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from fabric.auth import Identity, Keys, Users
from fabric.batches import jsonl
from fabric.batches.answerer import Answerer
from fabric.batches.book import Book
from fabric.batches.callers import get_caller
from fabric.batches.closing import Closing
from fabric.batches.files import Files
from fabric.batches.records import BatchRecord, BatchSettings, Json, Line
from fabric.batches.results import answered, refused
from fabric.errors import (
    FabricError,
    InsufficientBalance,
    NoReplica,
    NotFound,
    Overloaded,
    StreamBroken,
    TooManyRequests,
    UnknownModel,
)
from fabric.messages import new_id
from fabric.sql import Offload, utc_now

FIRST_BACKOFF_S = 0.25
LOOK_S = 0.05
"""How often a line that waits looks for a free row."""
_LINES_AT_ONCE = 1000

logger = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True, eq=False)
class _Job:
    """A batch under way. ``stop`` is set when no more lines should be asked; ``errors`` say why,
    if its caller did not ask for that; ``waits`` while a line is to be asked and cannot yet."""

    batch: BatchRecord
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    errors: list[Json] = field(default_factory=list)
    caller: Identity | None = None
    model: str = ""
    num_under_way: int = 0
    waits: bool = False
    task: asyncio.Task[None] | None = None


class Runner:
    """Works on the batches of one database, together with the runners of other hubs.

    Args:
        book: The batches.
        files: Their files.
        offload: The database's thread.
        keys: Who may still ask.
        users: Who of those that log in is kept out.
        answerer: Answers the lines.
        settings: The limits.
    """

    def __init__(
        self,
        *,
        book: Book,
        files: Files,
        offload: Offload,
        keys: Keys,
        users: Users,
        answerer: Answerer,
        settings: BatchSettings,
    ) -> None:
        self._book = book
        self._files = files
        self._offload = offload
        self._keys = keys
        self._users = users
        self._answerer = answerer
        self._settings = settings
        self._closing = Closing(book=book, files=files, offload=offload)
        self._id = new_id("runner")
        self._jobs: dict[str, _Job] = {}
        self._num_asked: Counter[str] = Counter()
        """Lines under way, by model."""
        self._news = asyncio.Event()
        self._watching: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look for work."""
        self._watching = asyncio.create_task(self._watch())

    async def close(self) -> None:
        """Drop the lines under way, uncharged, and leave the batches to whoever comes next."""
        if self._watching is None:
            return
        jobs = [job.task for job in self._jobs.values() if job.task is not None]
        tasks = [self._watching, *jobs]
        self._watching = None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._offload(self._book.release, self._id)

    def wake(self) -> None:
        """Look now: there is something new."""
        self._news.set()

    # ---- which batches --------------------------------------------------------------------------

    async def _watch(self) -> None:
        swept_at = -self._settings.sweep_s
        while True:
            self._news.clear()
            try:
                await self._look()
                if time.monotonic() - swept_at >= self._settings.sweep_s:
                    swept_at = time.monotonic()
                    await self._offload(self._files.sweep)
                    await self._closing.prune()
            except Exception:
                logger.exception("batches not looked after; it is tried again")
            with suppress(TimeoutError):
                async with asyncio.timeout(self._settings.poll_s):
                    await self._news.wait()

    async def _look(self) -> None:
        """Claim batches, begin with those that are new, and stop those that should."""
        claimed = await self._offload(self._book.claim, self._id, self._settings.num_batches)
        for batch in claimed:
            job = self._jobs.get(batch.id)
            if job is None:
                job = self._jobs[batch.id] = _Job(batch=batch)
            try:
                job.caller = await self._offload(get_caller, self._keys, self._users, batch)
            except FabricError as error:
                job.errors[:] = [{"code": error.code, "message": error.message}]
                job.stop.set()
            if batch.status == "cancelling":
                job.stop.set()
            if job.task is None:
                job.task = asyncio.create_task(self._run(job), name=batch.id)
        for batch_id in self._jobs.keys() - {batch.id for batch in claimed}:
            # Another runner has taken it up, or it has just ended.
            if (task := self._jobs[batch_id].task) is not None:
                task.cancel()

    async def _run(self, job: _Job) -> None:
        batch_id = job.batch.id
        try:
            if job.batch.status == "validating" and not await self._read(job):
                return
            if job.batch.status == "in_progress":
                await self._ask_all(job)
            await self._closing.close(batch_id, job.errors)
        except Exception:
            logger.exception("batch not finished; it is taken up again", extra={"batch": batch_id})
            await asyncio.sleep(self._settings.poll_s)
            await self._offload(self._book.release, self._id, batch_id)
        finally:
            del self._jobs[batch_id]
            self._news.set()

    # ---- one batch ------------------------------------------------------------------------------

    async def _read(self, job: _Job) -> bool:
        """Read the input; say whether its lines may be asked."""
        batch = job.batch
        path = self._files.path(batch.input_file)
        found = jsonl.Scan()
        try:
            found = await asyncio.to_thread(jsonl.scan, path, batch.endpoint, self._settings)
            if found.model is not None and not found.errors and job.caller is not None:
                await self._answerer.find(job.caller, found.model)
        except FileNotFoundError:
            found.note(NotFound.code, "The input file is not there any more.", line=None)
        except UnknownModel as error:
            found.note(error.code, error.message, line=found.lines[0].number, param="body.model")
        if found.errors:
            await self._offload(self._book.end, batch.id, "failed", errors=found.errors)
            return False
        assert found.model is not None
        await self._offload(self._book.forget_lines, batch.id)
        for first in range(0, len(found.lines), _LINES_AT_ONCE):
            some = found.lines[first : first + _LINES_AT_ONCE]
            await self._offload(self._book.add_lines, batch.id, some)
        job.batch = await self._offload(
            self._book.begin, batch.id, model=found.model, num_lines=len(found.lines)
        )
        return True

    async def _ask_all(self, job: _Job) -> None:
        """Ask all lines without a result, until that is done, asked to stop, or out of time."""
        if job.stop.is_set():
            return
        left_s = (job.batch.expires_at - utc_now()).total_seconds()
        asking = asyncio.create_task(self._ask_pending(job))
        stopping = asyncio.create_task(job.stop.wait())
        try:
            await asyncio.wait(
                {asking, stopping}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED
            )
            if asking.done():
                asking.result()
        finally:
            asking.cancel()
            stopping.cancel()
            await asyncio.gather(asking, stopping, return_exceptions=True)

    async def _ask_pending(self, job: _Job) -> None:
        assert job.caller is not None
        try:
            job.model = await self._answerer.find(job.caller, str(job.batch.model))
        except UnknownModel as error:
            job.errors[:] = [{"code": error.code, "message": error.message}]
            return
        pages = self._book.pending(job.batch.id)
        async with asyncio.TaskGroup() as group:
            while page := await self._offload(next, pages, ()):
                for line in page:
                    await self._turn(job)
                    job.num_under_way += 1
                    self._num_asked[job.model] += 1
                    group.create_task(self._ask(job, line)).add_done_callback(
                        partial(self._asked, job)
                    )

    async def _turn(self, job: _Job) -> None:
        """Wait until one more line may be asked: of this batch, and of its model's spare rows."""
        job.waits = True
        try:
            while not self._has_room(job):  # noqa: ASYNC110
                await asyncio.sleep(LOOK_S)
        finally:
            job.waits = False

    def _has_room(self, job: _Job) -> bool:
        if job.num_under_way >= self._settings.num_parallel:
            return False
        model, expires_at = job.model, job.batch.expires_at
        if any(
            other.waits
            and other.model == model
            and other.batch.expires_at < expires_at
            and other.num_under_way < self._settings.num_parallel
            for other in self._jobs.values()
        ):
            return False
        rows, asked = self._answerer.rows(model), self._num_asked[model]
        if not rows.num_rows:
            return False
        others = max(0, rows.num_busy - asked)
        return asked < max(1, int(self._settings.share * rows.num_rows)) - others

    def _asked(self, job: _Job, _task: asyncio.Task[None]) -> None:
        job.num_under_way -= 1
        self._num_asked[job.model] -= 1

    # ---- one line -------------------------------------------------------------------------------

    async def _ask(self, job: _Job, line: Line) -> None:
        batch, tries = job.batch, 0
        raw = await asyncio.to_thread(
            self._files.read, batch.input_file, line.offset_bytes, line.num_bytes
        )
        body = jsonl.parse(raw)["body"]
        assert isinstance(body, dict)
        while True:
            assert job.caller is not None
            seed = f"{batch.id}:{line.number}:{batch.life}:{tries}"
            left_s = (batch.expires_at - utc_now()).total_seconds()
            try:
                answer = await self._answerer.answer(
                    job.caller,
                    batch.endpoint,
                    body,
                    seed=seed,
                    deadline_s=max(1.0, min(self._settings.line_deadline_s, left_s)),
                )
            except FabricError as error:
                tries += 1
                if not self._is_worth_another(job, error, tries):
                    result = refused(batch, line, error, self._answerer.refusal(error))
                    finish = partial(self._book.finish_line, batch.id, line.number, charge_usu=None)
                    await self._offload(finish, result)
                    return
                pause_s = FIRST_BACKOFF_S * 2.0 ** min(tries, 10)
                await asyncio.sleep(min(pause_s, self._settings.max_backoff_s))
            else:
                result = answered(batch, line, answer)
                finish = partial(self._book.finish_line, charge_usu=answer.charge_usu)
                await answer.keep(partial(finish, batch.id, line.number, result))
                return

    def _is_worth_another(self, job: _Job, error: FabricError, tries: int) -> bool:
        if isinstance(error, NoReplica | Overloaded | TooManyRequests):
            return True
        if isinstance(error, InsufficientBalance):
            # What the batch's other lines hold, or held when a hub was killed, may come back.
            return job.num_under_way > 1 or (
                job.batch.life > 1 and tries < self._settings.max_tries
            )
        # Nobody has seen a token of what broke off, so it may begin again.
        may_succeed = error.retryable or isinstance(error, StreamBroken)
        return may_succeed and tries < self._settings.max_tries
