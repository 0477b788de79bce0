"""What the commands about launches share: finding, preparing, following and showing them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click
from pydantic import ValidationError

from fabric.cli import launching
from fabric.cli.output import Column
from fabric.config import (
    ComputeExecutor,
    SiteSpec,
    StateDir,
    find_site,
    load_settings,
    load_site,
)
from fabric.errors import BlockFailed, LaunchImpossible, UnknownModel
from fabric.launch.jobs import (
    JobRecord,
    LaunchFolder,
    LaunchPlan,
    LaunchRecord,
    Order,
    get_launch_plan,
)
from fabric.launch.jobs.charges import JobAccounts
from fabric.launch.jobs.history import History
from fabric.launch.jobs.launcher import Launcher
from fabric.launch.jobs.login import LoginNode
from fabric.launch.jobs.means import Means, get_means
from fabric.launch.jobs.plan import get_scheduler
from fabric.launch.jobs.records import Via
from fabric.launch.jobs.through import get_login
from fabric.messages.wire import Wire

if TYPE_CHECKING:
    from fabric.sdk import Fabric

POLL_S = 0.2

T = TypeVar("T", bound=Wire)


def root() -> Path:
    """Return where this user's launches are kept."""
    state = StateDir(load_settings({}).state_dir)
    state.create()
    state.launches_dir.mkdir(mode=0o700, exist_ok=True)
    return state.launches_dir


def checked(model: type[T], fields: Mapping[str, object]) -> T:
    """Return a record made of what was typed.

    Raises:
        LaunchImpossible: A value is not of its form.
    """
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        param = ".".join(str(part) for part in first["loc"])
        raise LaunchImpossible(param=param, value=first["input"], reason=first["msg"]) from None


def find_version(fabric: Fabric, model: str) -> str:
    """Return the version a model's name means at the hub, as ``name@revision``.

    Raises:
        UnknownModel: The hub has none of this name.
    """
    known = [one for one in fabric.models() if model in (one.id, one.name)]
    if not known:
        raise UnknownModel(model=model, known=[one.id for one in fabric.models()])
    return known[-1].id


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A launch that can be made: its plan, who pays, what will be kept of it, and the way there."""

    plan: LaunchPlan
    means: Means
    record: LaunchRecord
    login: LoginNode


@contextmanager
def prepared(
    order: Order, fabric: Fabric, *, via: Via | None, module: str = "fabric.instance"
) -> Iterator[Prepared]:
    """Yield a planned order.

    Raises:
        LaunchImpossible: The machine cannot do it.
        SettingInvalid: There is no such site file.
        FabricError: The machine's endpoint cannot be reached.
    """
    site, where = load_site(find_site(order.machine)), root()
    order = _as_at_site(order, site)
    get_scheduler(site)
    way = via or ("endpoint" if isinstance(site.executor, ComputeExecutor) else "login")
    login = get_login(site, way, where, must_answer=True)
    try:
        plan = get_launch_plan(order, site, History.under(where), ask=login.estimate_wait)
        record = LaunchRecord(
            name="l-00000000",
            order=order,
            site=site,
            queue=plan.queue,
            hub_url=fabric.base_url,
            via=way,
            ranks=plan.division.ranks,
            module=module,
            created_at=datetime.now(UTC),
        )
        means = get_means(plan, login.balance)
        yield Prepared(plan=plan, means=means, record=record, login=login)
    finally:
        login.close()


def _as_at_site(order: Order, site: SiteSpec) -> Order:
    """Return an order with the options of the machine's file where it says nothing itself."""
    for model in site.models:
        if order.model == f"{model.name}@{model.revision}":
            asked = {name: getattr(order.options, name) for name in order.options.model_fields_set}
            return order.model_copy(update={"options": model.options.model_copy(update=asked)})
    return order


def submit(prepared: Prepared, fabric: Fabric) -> LaunchFolder:
    """Submit the first jobs of a launch, and have it watched by a process of its own.

    Raises:
        FabricError: None was submitted.
    """
    given = click.get_current_context().params
    folder = LaunchFolder.create(root())
    folder.write_launch(prepared.record.model_copy(update={"name": folder.name}))
    history = History.under(folder.path.parent)
    with folder.watched() as lock:
        assert lock is not None, "nobody else knows of it yet"
        Launcher(folder, fabric, history, prepared.login, plan=prepared.plan).begin()
        launching.start(folder, lock, api_key=given.get("api_key"), project=given.get("project"))
    return folder


def wait_ready(folder: LaunchFolder) -> None:
    """Show how far a launch is until its first instance is ready.

    Raises:
        BlockFailed: It ended before, or nobody watches it any more.
    """
    from fabric.cli.progress import following

    heads = ["LAUNCH", "MACHINE", "JOB", "STATE", "DETAIL"]
    with following(heads, heads.index("STATE")) as show:
        while True:
            is_watched = folder.is_watched()
            record, jobs = folder.launch(), folder.jobs()
            shown = [row[:2] + row[3:5] + row[7:] for row in rows(folder, jobs)]
            show(shown)
            if any(job.ready_at is not None for job in jobs):
                return
            if record is not None and record.ended_at is not None:
                raise _failed(folder, record.detail)
            if not is_watched:
                again = "`fabric instances --watch` starts another, which finds its jobs"
                raise _failed(folder, f"the process that watched it was killed; {again}")
            time.sleep(POLL_S)


COLUMNS = (
    *(Column("LAUNCH", whole=True), "MACHINE", "FOR", Column("JOB", whole=True), "STATE"),
    *(Column("LEFT", numeric=True), Column("CHARGE", numeric=True), "DETAIL"),
)


def rows(folder: LaunchFolder, jobs: list[JobRecord]) -> list[tuple[object, ...]]:
    """Return a line for each job of a launch."""
    record = folder.launch()
    if record is None:
        return []
    heads = (folder.name, record.order.machine, _users(record.order))
    if not jobs:
        return [(*heads, "", record.state, "", "", record.detail)]
    return [(*heads, j.job_id or "", j.state, _left(j), _charge(j), j.remark) for j in jobs]


def is_settled(folder: LaunchFolder) -> bool:
    """Return whether a launch is over, and the hub has what its jobs took."""
    record = folder.launch()
    if record is None or record.ended_at is None:
        return record is None
    accounts = JobAccounts(record.order, record.site, record.queue)
    return not any(accounts.owes(job) for job in folder.jobs())


def describe(folder: LaunchFolder) -> dict[str, object]:
    """Return a launch as data; nothing secret is in it."""
    record = folder.launch()
    assert record is not None
    return {
        **record.model_dump(mode="json", exclude={"site"}),
        "jobs": [job.model_dump(mode="json") for job in folder.jobs()],
        "watched": folder.is_watched(),
    }


def _users(order: Order) -> str:
    """Return who may use a launch's instances, and whether their requests may go elsewhere."""
    return (
        order.sharing if order.keeps or order.sharing == "shared" else f"{order.sharing}, overflow"
    )


def _left(job: JobRecord) -> str:
    if job.deadline_at is None or not job.open:
        return ""
    left_s = max(0, int((job.deadline_at - datetime.now(UTC)).total_seconds()))
    return f"{left_s // 3600}:{left_s // 60 % 60:02}:{left_s % 60:02}"


def _charge(job: JobRecord) -> str:
    return "" if job.charge is None else f"{job.charge:.3g} {job.unit}s"


def _failed(folder: LaunchFolder, reason: str) -> BlockFailed:
    record = folder.launch()
    jobs = folder.jobs()
    return BlockFailed(
        site=record.order.machine if record else folder.name,
        reason=reason.rstrip("."),
        log_path=str(folder.best_log(jobs[-1].instance if jobs else None)),
    )
