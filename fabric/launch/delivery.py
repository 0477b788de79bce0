"""Runs batches of requests on an instance of this machine: the registered function ``infer``.

A batch of the hub has the instance's direct token and holds tasks, and ``Cancel`` or ``Drain`` to
deliver before them. A batch without it is a raw call (``fabric.launch.rawcalls``): it goes in by
the site's guest token, and its ticket pays.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Annotated, Any, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from fabric.config import load_worker
from fabric.errors import (
    FabricError,
    NoReplica,
    RequestInvalid,
    SessionLost,
)
from fabric.launch.answers import fit, to_json
from fabric.launch.rawcalls import as_item, get_error, get_id, get_request, get_result
from fabric.launch.relay import RelaySession, open_session
from fabric.launch.rundir import LocalInstance, RunDir
from fabric.messages import (
    Cancel,
    Drain,
    Event,
    Failed,
    Failure,
    Hello,
    InstanceState,
    ModelRef,
    Task,
)
from fabric.messages.wire import Wire

MAX_TASKS = 1024
LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})

_OF_PROGRAM = frozenset({"program", "tier", "deadline_s"})
_events: TypeAdapter[Event] = TypeAdapter(Event)


class Address(Wire):
    """Which instance, or else any ready one of ``model``; and the token or the ticket for it."""

    instance: str | None = None
    model: ModelRef | None = None
    token: str | None = Field(default=None, repr=False)
    ticket: str | None = Field(default=None, repr=False)


class Batch(Address):
    """What ``infer`` is given."""

    frames: tuple[Annotated[Cancel | Drain, Field(discriminator="type")], ...] = ()
    describe: bool = False
    tasks: tuple[dict[str, Any], ...] = Field(default=(), max_length=MAX_TASKS)


_Asked = TypeVar("_Asked", bound=Address)


class _Key(BaseModel):
    """The fields of a task that tell its events from others'."""

    id: str
    attempt: int = Field(ge=1)
    deadline_s: float = Field(gt=0.0, le=86_400.0)


def infer(batch: Mapping[str, Any], run_dir: str) -> dict[str, Any]:
    """Run a batch at once and return its events; for a raw call, its results too.

    What goes wrong at the instance is in the answer: as ``error`` if it concerns the batch, and in
    any case as the last event of every task it ended. An answer over 5 MB goes to the site's store
    and a reference is returned; without a store its largest tasks fail.

    Raises:
        RequestInvalid: The batch or ``run_dir`` cannot be used. (A wrong item of a raw call is
            that item's error.)
    """
    asked = _parse(Batch, "batch", batch)
    folder = RunDir(run_dir)
    items = _get_raw_tasks(asked) if asked.token is None else _get_tasks(asked)
    answer: dict[str, Any] = {"instance": asked.instance, "hello": None, "heartbeat": None}
    try:
        one = _choose(folder, asked)
        answer["instance"] = one.instance
        with _open(one, asked.token) as session:
            for frame in asked.frames:
                session.send(frame.model_dump_json())
            if asked.describe:
                hello, heartbeat = map(json.loads, session.describe())
                answer |= {"hello": hello, "heartbeat": heartbeat}
            events = _run(session, items)
    except FabricError as error:
        answer["error"] = Failure.of(error).model_dump(mode="json")
        events = [[] if isinstance(item, FabricError) else [_fail(item, error)] for item in items]
    answer["events"] = [[to_json(event) for event in row] for row in events]
    if asked.token is None:
        answer["results"] = [
            get_error(item) if isinstance(item, FabricError) else get_result(row, item.request)
            for item, row in zip(items, events, strict=True)
        ]
    return fit(answer, folder)


def run_program(program: Mapping[str, Any], run_dir: str) -> dict[str, Any]:
    """Run a program and return its events.

    A raw call gives the ``program`` itself and also gets its result. The hub gives a ``task``, of
    which no part is read here but its id, attempt and deadline: what the instance makes of it is
    the instance's to say.

    Args:
        program: The fields of ``Address``, and the ``program`` (with ``tier`` and ``deadline_s``
            if they matter) or the ``task``.
        run_dir: Where the site's instances are.

    Raises:
        RequestInvalid: The program cannot be delivered as it is.
    """
    fields = dict(program)
    if "program" in fields and "task" not in fields:
        item = {name: fields.pop(name) for name in _OF_PROGRAM & fields.keys()}
        return infer({**fields, "tasks": [as_item(item)]}, run_dir)
    task = fields.pop("task", None)
    asked = _parse(Address, "program", fields)
    folder = RunDir(run_dir)
    try:
        key = _Key.model_validate(task)
    except ValidationError as error:
        raise _invalid("program.task", error) from None
    if asked.ticket is not None:
        task = {**task, "ticket": asked.ticket}
    answer: dict[str, Any] = {"instance": asked.instance}
    try:
        one = _choose(folder, asked)
        answer["instance"] = one.instance
        with _open(one, asked.token) as session:
            keys = [(key.id, key.attempt, key.deadline_s)]
            (lines,) = session.deliver([json.dumps(task)], keys)
        events = [_events.validate_json(line) for line in lines]
    except FabricError as error:
        answer["error"] = Failure.of(error).model_dump(mode="json")
        events = [_fail(key, error)]
    answer["events"] = [[to_json(event) for event in events]]
    return fit(answer, folder)


def _get_tasks(asked: Batch) -> list[Task | FabricError]:
    """Return the hub's own tasks, which are what they must be."""
    try:
        return [Task.model_validate(item) for item in asked.tasks]
    except ValidationError as error:
        raise _invalid("batch.tasks", error) from None


def _get_raw_tasks(asked: Batch) -> list[Task | FabricError]:
    """Return the items of a raw call as tasks, whose digest is still to be filled in."""
    if asked.frames:
        reason = "a raw call can neither cancel nor drain"
        raise RequestInvalid(param="batch.frames", value=len(asked.frames), reason=reason)
    task_id = load_worker().task_id
    items: list[Task | FabricError] = []
    for index, item in enumerate(asked.tasks):
        try:
            request = get_request(item, id=get_id(task_id, index), model=asked.model)
        except RequestInvalid as error:
            items.append(error)
            continue
        items.append(
            Task(
                id=request.id,
                attempt=1,
                request=request,
                digest="",
                deadline_s=request.deadline_s,
                ticket=asked.ticket,
            )
        )
    return items


def _choose(folder: RunDir, asked: Address) -> LocalInstance:
    """Return the instance that a batch names, or one that is ready for its model."""
    if asked.instance is not None:
        found = folder.find(asked.instance)
        if found is None:
            reason = f"no worker of this site runs it (run_dir {folder.path})"
            raise SessionLost(instance=asked.instance, reason=reason)
        return found
    if asked.model is None:
        raise RequestInvalid(param="batch.model", value=None, reason="name a model or an instance")
    reasons: dict[str, str] = {}
    ready: list[LocalInstance] = []
    for one in folder.instances():
        model = one.status.model if one.status is not None else ""
        if one.status is None or one.status.state != InstanceState.READY:
            reasons[one.instance] = f"it is {one.status.state if one.status else 'starting'}"
        elif asked.model not in (model, model.partition("@")[0]):
            reasons[one.instance] = f"it runs {model}"
        elif not one.place.here:
            reasons[one.instance] = f"it is reached from {one.place.host} only"
        else:
            ready.append(one)
    if not ready:
        raise NoReplica(model=asked.model, reasons=reasons)
    return random.choice(ready)  # noqa: S311


def _open(one: LocalInstance, token: str | None) -> AbstractContextManager[RelaySession]:
    """Return a session with an instance, which raises ``FabricError`` alone.

    Raises:
        SessionLost: The instance has no direct route yet, or none that leads here.
    """
    status = one.status
    if status is None or status.direct_url is None:
        doing = "is starting" if status is None else f"is {status.state}: {status.detail}"
        raise SessionLost(instance=one.instance, reason=f"it takes no requests yet and {doing}")
    if not one.place.here and urlsplit(status.direct_url).hostname in LOOPBACK:
        reason = f"it is reached from {one.place.host} only"
        raise SessionLost(instance=one.instance, reason=reason)
    return _opened(one.instance, status.direct_url, token or status.guest_token or "")


@contextmanager
def _opened(instance: str, direct_url: str, token: str) -> Iterator[RelaySession]:
    try:
        with open_session(direct_url, token) as session:
            yield session
    except ConnectionError as error:
        raise SessionLost(instance=instance, reason=str(error)) from error


def _run(session: RelaySession, items: Sequence[Task | FabricError]) -> list[list[Event]]:
    hello = Hello.model_validate_json(session.hello)
    tasks = [
        item if item.digest else item.model_copy(update={"digest": hello.digest})
        for item in items
        if isinstance(item, Task)
    ]
    ran = iter(session.run(tasks) if tasks else ())
    return [
        [_events.validate_json(line) for line in next(ran)] if isinstance(item, Task) else []
        for item in items
    ]


def _fail(task: Task | _Key, error: FabricError) -> Event:
    return Failed(task_id=task.id, attempt=task.attempt, failure=Failure.of(error))


def _parse(model: type[_Asked], param: str, fields: Mapping[str, Any]) -> _Asked:
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise _invalid(param, error) from None


def _invalid(param: str, error: ValidationError) -> RequestInvalid:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(map(str, (param, *first["loc"])))
    # The value may be a token or a prompt.
    return RequestInvalid(param=where, value="that", reason=first["msg"])
