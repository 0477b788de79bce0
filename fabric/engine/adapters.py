"""Adapters at run time: fetched on demand, held while rows use them, given up when room is needed.

A task with an adapter waits here until that is loaded, on a thread of its own, while the other
tasks go on; it then goes to the engine. Its adapter stays until the task's last event.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from logging import getLogger

import torch
from torch import Tensor

from fabric.engine.interface import EventSink, FetchAdapter
from fabric.engine.lowrank import Delta, Factors, LowRankLayers
from fabric.engine.reports import Reports
from fabric.errors import (
    AdapterInvalid,
    AdapterMemoryFull,
    AdapterUnavailable,
    DeadlineExceeded,
    FabricError,
    LowRankInvalid,
    RequestCancelled,
)
from fabric.messages import Event, Failed, Finished, Task
from fabric.payloads import RawTensor
from fabric.payloads.lora import Lora, digest_of, read_lora

_logger = getLogger(__name__)

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

Pass = Callable[[Task, EventSink, float], None]
"""Gives the engine a task whose adapter is loaded, its sink, and when it came."""

Tell = Callable[[EventSink, Event], object]


@dataclass(slots=True, kw_only=True, eq=False)
class _Waiting:
    """A task whose adapter is not there yet; only ``cancelled`` changes."""

    task: Task
    sink: EventSink
    received_at: float
    cancelled: bool = False

    @property
    def due_at(self) -> float:
        """When its deadline has come, on ``time.monotonic``."""
        return self.received_at + self.task.deadline_s


@dataclass(slots=True, kw_only=True, eq=False)
class _Loaded:
    """An adapter in memory, and how many tasks use it.

    ``shared_s`` is what one task would have used of its slot, had it always been among the users:
    the seconds, each divided by how many they were.
    """

    delta: Delta
    num_users: int = 0
    shared_s: float = 0.0
    counted_at: float = 0.0

    def change_users(self, by: int) -> float:
        """Count users in or out; return ``shared_s`` until now."""
        now = time.monotonic()
        if self.num_users:
            self.shared_s += (now - self.counted_at) / self.num_users
        self.num_users, self.counted_at = self.num_users + by, now
        return self.shared_s


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterStats:
    """Counts since the engine's start, and what is loaded now by digest."""

    loaded: tuple[str, ...] = ()
    num_bytes: int = 0
    num_loads: int = 0
    num_evictions: int = 0


class Adapters:
    """The adapters of one engine. Thread-safe.

    Args:
        layers: What adapters change.
        fetch: Gives their files by digest; ``None``: there are none here.
        budget_bytes: What they may take together, as they lie in memory.
        submit: Takes tasks whose adapter is loaded.
        tell: Gives a sink an event.
    """

    def __init__(
        self,
        layers: LowRankLayers,
        fetch: FetchAdapter | None,
        *,
        budget_bytes: int,
        submit: Pass,
        tell: Tell,
    ) -> None:
        self._layers = layers
        self._fetch = fetch
        self._budget_bytes = budget_bytes
        self._submit = submit
        self._tell = tell
        self._changed = threading.Condition()
        self._loaded: OrderedDict[str, _Loaded] = OrderedDict()
        """Those used longest ago first."""
        self._waiting: deque[_Waiting] = deque()
        self._thread: threading.Thread | None = None
        self._closed: FabricError | None = None
        self._num_loads = self._num_evictions = 0

    @property
    def num_waiting(self) -> int:
        """Choices of tasks that wait for their adapter."""
        with self._changed:
            return sum(one.task.request.sampling.n for one in self._waiting)

    @property
    def stats(self) -> AdapterStats:
        """What is loaded, and what happened so far."""
        with self._changed:
            return AdapterStats(
                loaded=tuple(self._loaded),
                num_bytes=self._num_bytes,
                num_loads=self._num_loads,
                num_evictions=self._num_evictions,
            )

    def take(self, task: Task, sink: EventSink, received_at: float) -> None:
        """Pass a task on with its adapter: at once if that is loaded, else when it is.

        A load that fails ends this task alone.
        """
        with self._changed:
            closed = self._closed
            is_here = closed is None and task.adapter in self._loaded
            if is_here:
                # With the lock held, so that a cancellation comes before or after, and is heard.
                self._submit(task, self._hold(task, sink), received_at)
            elif closed is None:
                self._waiting.append(_Waiting(task=task, sink=sink, received_at=received_at))
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="adapters", daemon=True)
                    self._thread.start()
                self._changed.notify_all()
        if closed is not None:
            self._tell(sink, Reports.failed(task, closed))

    def delta_of(self, task: Task) -> tuple[Delta, ...]:
        """Return what a task that was passed on changes; nothing for one without an adapter."""
        if task.adapter is None:
            return ()
        with self._changed:
            return (self._loaded[task.adapter].delta,)

    def cancel(self, task_id: str, attempt: int) -> None:
        """End a task that waits here; others are ignored."""
        with self._changed:
            ids = [(one.task.id, one.task.attempt) for one in self._waiting]
            if (task_id, attempt) not in ids:
                return
            one = self._waiting[ids.index((task_id, attempt))]
            one.cancelled = True
            if one is self._waiting[0]:
                self._changed.notify_all()
                return  # its load ends it
            self._waiting.remove(one)
        self._tell(one.sink, Reports.failed(one.task, RequestCancelled()))

    def close(self, error: FabricError) -> None:
        """End the tasks that wait here. What is being fetched is left to itself."""
        with self._changed:
            self._closed = error
            waiting, self._waiting = self._waiting, deque()
            self._changed.notify_all()
        for one in waiting:
            self._tell(one.sink, Reports.failed(one.task, error))

    # ---- the loading thread ----------------------------------------------------------------------

    def _run(self) -> None:
        while (one := self._next()) is not None:
            error: FabricError | None = None
            try:
                self._load(one)
            except FabricError as failure:
                error = failure
            except Exception as failure:
                _logger.exception("an adapter could not be loaded", extra={"task": one.task.id})
                reason = f"{type(failure).__name__}: {failure}"
                error = AdapterUnavailable(digest=str(one.task.adapter), reason=reason)
            with self._changed:
                if self._closed is not None:
                    return  # whoever closed has ended the task
                self._waiting.popleft()
                if one.cancelled:
                    error = RequestCancelled()
                if error is None:
                    self._submit(one.task, self._hold(one.task, one.sink), one.received_at)
            if error is not None:
                self._tell(one.sink, Reports.failed(one.task, error))

    def _next(self) -> _Waiting | None:
        """Return the task that has waited longest, which stays where it is; ``None`` at the end."""
        with self._changed:
            while not (self._waiting or self._closed):
                self._changed.wait()
            return None if self._closed else self._waiting[0]

    def _load(self, one: _Waiting) -> None:
        """See that the adapter of a task is there when this returns."""
        digest = str(one.task.adapter)
        self._check(one)
        with self._changed:
            if digest in self._loaded:
                return
        delta = self._place(digest)
        with self._changed:
            self._make_room(one, delta.num_bytes)
            self._loaded[digest] = _Loaded(delta=delta)
            self._num_loads += 1

    def _place(self, digest: str) -> Delta:
        if self._fetch is None:
            raise AdapterInvalid(adapter=digest, reason="this instance serves no adapters")
        data = self._fetch(digest)
        if (actual := digest_of(data)) != digest:
            raise AdapterUnavailable(digest=digest, reason=f"what came has the digest {actual}")
        lora = read_lora(digest, data)
        _check_size(lora, self._layers, self._budget_bytes)
        try:
            return self._layers.place(
                {
                    name: Factors(
                        down_RK=_to_torch(layer.down), up_OR=_to_torch(layer.up), scale=layer.scale
                    )
                    for name, layer in lora.layers.items()
                }
            )
        except LowRankInvalid as error:
            where, why = error.detail["layer"], error.detail["reason"]
            reason = f"its layer {where} does not fit this model: {why}"
            raise AdapterInvalid(adapter=digest, reason=reason) from error

    def _make_room(self, one: _Waiting, needed_bytes: int) -> None:
        """Give up adapters that nobody uses; wait for those of running tasks.

        Raises:
            DeadlineExceeded: The task's deadline came first.
            RequestCancelled: The task was cancelled.
        """
        while self._num_bytes + needed_bytes > self._budget_bytes:
            idle = next((d for d, held in self._loaded.items() if not held.num_users), None)
            if idle is not None:
                del self._loaded[idle]
                self._num_evictions += 1
                continue
            self._check(one)
            self._changed.wait(max(0.0, one.due_at - time.monotonic()))

    def _check(self, one: _Waiting) -> None:
        if one.cancelled:
            raise RequestCancelled
        if self._closed is not None:
            raise self._closed
        if time.monotonic() >= one.due_at:
            task = one.task
            raise DeadlineExceeded(deadline_s=task.deadline_s, attempts=task.attempt)

    # ---- with the lock held ----------------------------------------------------------------------

    @property
    def _num_bytes(self) -> int:
        return sum(held.delta.num_bytes for held in self._loaded.values())

    def _hold(self, task: Task, sink: EventSink) -> EventSink:
        """Count a task as a user of its adapter; return a sink that lets go at its last event,
        which then tells what the task used of the slot."""
        digest = str(task.adapter)
        self._loaded.move_to_end(digest)
        loaded = self._loaded[digest]
        began_s = loaded.change_users(+1)

        def hear(event: Event) -> None:
            if isinstance(event, Finished | Failed):
                with self._changed:
                    used_s = loaded.change_users(-1) - began_s
                    self._changed.notify_all()
                usage = event.usage.model_copy(update={"adapter_s": used_s})
                event = event.model_copy(update={"usage": usage})
            sink(event)

        return hear


def _check_size(lora: Lora, layers: LowRankLayers, limit_bytes: int) -> None:
    """Refuse an adapter that could never be loaded before any memory is taken for it."""
    item_bytes = layers.dtype.itemsize
    needed_bytes = sum(
        len(x.data) // x.item_bytes * item_bytes
        for layer in lora.layers.values()
        for x in (layer.down, layer.up)
    )
    if needed_bytes > limit_bytes:
        raise AdapterMemoryFull(needed_bytes=needed_bytes, limit_bytes=limit_bytes)


def _to_torch(x: RawTensor) -> Tensor:
    return torch.frombuffer(bytearray(x.data), dtype=_DTYPES[x.dtype]).reshape(x.shape)
