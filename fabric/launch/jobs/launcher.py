"""Keeps a launch going: submits its jobs, watches them, hands over and ends them.

All that it knows is on disk (``LaunchFolder``): one that was killed is started again and finds its
jobs. It works in one thread, where the scheduler's commands are or by the machine's endpoint there
(``LoginNode``).
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime

from fabric.errors import (
    AuthError,
    DispatchError,
    FabricError,
    JobRefused,
    JobsFailing,
    NotFound,
    UnknownModel,
)
from fabric.launch.jobs.charges import JobAccounts, describe
from fabric.launch.jobs.decide import (
    MAX_FAILURES,
    Action,
    HandOver,
    Leave,
    Outlook,
    Over,
    Submit,
    decide,
    get_ready_in_s,
)
from fabric.launch.jobs.history import History
from fabric.launch.jobs.hub import InstanceHub
from fabric.launch.jobs.login import LoginNode, Sight
from fabric.launch.jobs.observe import LEAVING, observe
from fabric.launch.jobs.plan import LaunchPlan, get_launch_plan
from fabric.launch.jobs.queue import JobPhase
from fabric.launch.jobs.records import JobRecord, LaunchFolder, LaunchRecord
from fabric.launch.jobs.standing import Standing
from fabric.messages import InstanceSpec, InstanceState, Launch

SLOWEST_POLL_S = 15.0
SETTLE_POLL_S = 2.0
SETTLE_S = 600.0
"""A launch that is over waits so long until the hub has what its jobs took."""
FORECAST_S = 60.0
"""A scheduler is asked for a forecast at most so often."""
BEGIN_S = 240.0
"""Whoever launches waits so long for an answer; an endpoint may have to start first."""
LEAVE_S = 120.0
"""A job that was asked to leave and has not ended after so long is cancelled."""
EXPECT_S = 10.0
"""The hub is told again so often when an instance should join."""
LIFETIME_S = 30 * 86_400.0
"""How long an instance may take to join: a queue of weeks."""
logger = logging.getLogger(__name__)


class Launcher:
    """Watches one launch until it is over.

    Args:
        folder: Its records.
        hub: Where its instances join.
        history: What later launches learn from.
        login: Where its jobs are submitted.
        plan: As it was just made; without it one is made when it is needed.
        clock: The time in UTC.
    """

    def __init__(
        self,
        folder: LaunchFolder,
        hub: InstanceHub,
        history: History,
        login: LoginNode,
        *,
        plan: LaunchPlan | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        record = folder.launch()
        if record is None:
            raise NotFound(kind="launch", name=folder.name)
        self._folder = folder
        self._hub = hub
        self._history = history
        self._login = login
        self._clock = clock
        self._record: LaunchRecord = record
        self._jobs = {job.instance: job for job in folder.jobs()}
        self._plan = plan
        self._planned_at = time.monotonic()
        self._accounts = JobAccounts(record.order, record.site, record.queue)
        self._standing = Standing(hub, login.balance)
        self._unsent: dict[str, InstanceSpec] = {}
        self._vain: set[str] = set()
        self._joined: frozenset[str] = frozenset()
        self._busy_at: dict[str, datetime] = {}
        self._asked_at: dict[str, datetime] = {}
        self._starts_at: dict[str, datetime | None] = {}
        self._told: dict[str, tuple[InstanceState, datetime]] = {}
        self._changed_at = time.monotonic()

    def begin(self) -> None:
        """Submit the first jobs; whoever runs the launch next finds them.

        Raises:
            FabricError: None is submitted, and none will be.
        """
        until = time.monotonic() + BEGIN_S
        self._try_step(is_patient=False)
        while self._unsent and time.monotonic() < until:
            time.sleep(self._login.fastest_poll_s)
            self._try_step()
        if self._unsent:
            for job in [self._jobs[instance] for instance in self._unsent]:
                self._end_unsent(job, InstanceState.FAILED, job.unseen)
            self._try_step(is_patient=False)

    def run(self) -> None:
        """Watch until the launch is over, and the hub has what its jobs took.

        Raises:
            JobsFailing: Its jobs ended one after the other before they served.
            FabricError: The first job was refused.
        """
        try:
            if self._record.ended_at is None:
                self._bury_unknown()
                while self._try_step():
                    if self._plan is not None:
                        self._standing.look(self._plan, self._sorted(), self._now)
                    age_s = time.monotonic() - self._changed_at
                    fastest_s = self._login.fastest_poll_s
                    time.sleep(min(SLOWEST_POLL_S, max(fastest_s, age_s / 10)))
        finally:
            self._settle()

    def _bury_unknown(self) -> None:
        """End jobs whose launcher was killed while it submitted them: nobody knows their ids."""
        for job in self._sorted():
            if job.open and job.job_id is None:
                self._end_unsent(job, InstanceState.FAILED, "its launcher was killed")

    def _settle(self) -> None:
        """Tell the hub what is left to tell; a launch that is over waits for that a while."""
        until = time.monotonic() + SETTLE_S
        while self._owed() and time.monotonic() < until:
            self._observe()
            self._tell_charges()
            if self._owed():
                time.sleep(max(SETTLE_POLL_S, self._login.fastest_poll_s))

    def _owed(self) -> list[JobRecord]:
        jobs = [job for job in self._sorted() if job.instance not in self._vain]
        return [job for job in jobs if self._accounts.owes(job)]

    def _try_step(self, *, is_patient: bool = True) -> bool:
        try:
            return self.step()
        except JobsFailing:
            raise
        except FabricError as error:
            is_vain = is_hopeless(error) or not is_patient
            if is_vain and not any(job.open for job in self._jobs.values()):
                self._write_end(InstanceState.FAILED, error.message)
                raise
            logger.warning("tried again later: %s", error.message)
            return True

    def step(self) -> bool:
        """Look at everything once and do what is due; return whether it goes on.

        Raises:
            JobsFailing: As ``run``.
            FabricError: As ``run``.
        """
        if self._folder.is_deleted():
            self._abandon()
            return False
        on_disk = self._folder.launch()
        if on_disk is not None:
            # What its owner's other commands write.
            order = self._record.order.model_copy(update={"keep_until": on_disk.order.keep_until})
            self._record = self._record.model_copy(update={"stop": on_disk.stop, "order": order})
        for instance, spec in list(self._unsent.items()):
            self._send(self._jobs[instance], spec)
        self._observe()
        self._tell_charges()
        outlook = self._outlook()
        actions = decide(
            self._record.order,
            self._sorted(),
            self._clock(),
            outlook,
            stop=self._record.stop,
        )
        for action in actions:
            if isinstance(action, Over):
                self._finish(action)
                return False
            self._act(action)
        self._tell_outlook(outlook)
        self._summarize()
        return True

    # ---- what is seen ------------------------------------------------------------------------

    def _observe(self) -> None:
        ids = {job.instance: job.job_id for job in self._sorted() if job.job_id is not None}
        looked_at = {
            job.instance: ids[job.instance]
            for job in self._sorted()
            if job.instance in ids and (job.open or self._accounts.wants(job))
        }
        if not looked_at:
            return
        try:
            sights = self._login.look(self._record, looked_at)
        except FabricError as error:
            logger.warning("%s", error.message)
            for instance in looked_at:
                self._put_unseen(self._jobs[instance], error.message)
            return
        self._joined = self._ask_joined(sights)
        for instance, sight in sights.items():
            self._put_unseen(self._jobs[instance], "")
            if self._jobs[instance].open:
                self._note(self._jobs[instance], sight)
            if not (job := self._jobs[instance]).open:
                self._put(self._accounts.settle(job, sight.usage, self._now))

    def _ask_joined(self, sights: Mapping[str, Sight]) -> frozenset[str]:
        """Return which instances the hub has, if one says it is ready and was not known to be."""
        new = [sight for name, sight in sights.items() if self._jobs[name].ready_at is None]
        statuses = (sight.status for sight in new)
        if not any(one is not None and one.state == InstanceState.READY for one in statuses):
            return frozenset()
        try:
            return frozenset(one.instance for one in self._hub.instances() if one.connected)
        except FabricError as error:
            logger.warning("not asked who has joined: %s", error.message)
            return frozenset()

    def _note(self, job: JobRecord, sight: Sight) -> None:
        """Bring a job's record up to what its scheduler and its instance say."""
        if sight.state.phase is JobPhase.QUEUED:
            self._starts_at[job.instance] = sight.state.start_at
        joined = job.instance in self._joined
        changed = observe(job, sight, self._now, walltime_s=self._walltime_s(), joined=joined)
        if changed != job:
            self._put(changed)
            if changed.ready_at is not None and job.ready_at is None:
                self._history.remember(self._record.order, self._get_plan().queue, changed)
            if not changed.open:
                self._forget(changed)

    def _outlook(self) -> Outlook:
        plan = self._get_plan(fresh=True)
        now = self._clock()
        if self._record.order.idle_stop_s is not None:
            with suppress(FabricError):
                for one in self._hub.instances():
                    if one.num_running or one.num_waiting:
                        self._busy_at[one.instance] = now
        ready = {job.instance: job.ready_at for job in self._sorted() if job.ready_at}
        idle_s = {
            instance: (now - max(at, self._busy_at.get(instance, at))).total_seconds()
            for instance, at in ready.items()
        }
        return Outlook(wait_s=plan.wait.p90_s, load_s=plan.load_s, idle_s=idle_s)

    # ---- what is done ------------------------------------------------------------------------

    def _act(self, action: Action) -> None:
        match action:
            case Submit(replica=replica, generation=generation):
                self._submit(replica, generation)
            case HandOver(instance=instance):
                self._ask(instance, InstanceState.HANDING_OVER, "its successor is ready")
            case Leave(instance=instance, reason=reason):
                self._ask(instance, InstanceState.DRAINING, reason)
        self._cancel_what_lingers()

    def _submit(self, replica: int, generation: int) -> None:
        order, division = self._record.order, self._get_plan().division
        reply = self._hub.add_instance(
            order.model,
            order.machine,
            sharing=order.sharing,
            overflow=order.overflow,
            lifetime_s=LIFETIME_S,
        )
        launch = Launch.model_validate(reply)
        spec = InstanceSpec(
            launch=launch,
            # http://… becomes ws://…, and https://… wss://….
            session_url=self._record.hub_url.rstrip("/").replace("http", "ws", 1)
            + launch.session_path,
            direct_token=secrets.token_urlsafe(32),
            options=division.options,
            join_s=order.join_s,
            status_path="chosen where it runs",
        )
        job = JobRecord(
            instance=launch.instance,
            replica=replica,
            generation=generation,
            submitted_at=self._clock(),
        )
        self._put(job)
        self._send(job, spec)

    def _send(self, job: JobRecord, spec: InstanceSpec) -> None:
        """Submit a job, or note that it is to be submitted again: nobody knows whether it was."""
        self._unsent.pop(job.instance, None)
        try:
            job_id = self._login.submit(self._record, spec)
        except DispatchError as error:
            logger.warning("%s is submitted again: %s", job.instance, error.message)
            self._unsent[job.instance] = spec
            self._put_unseen(job, error.message)
            return
        except FabricError as error:
            ended = {"state": InstanceState.FAILED, "detail": error.message, "ended_at": self._now}
            self._put(job.model_copy(update=ended))
            self._forget(self._jobs[job.instance])
            if not any(other.open for other in self._jobs.values()):
                raise
            logger.warning("%s", error.message)
            return
        self._put(job.model_copy(update={"job_id": job_id, "unseen": ""}))

    def _ask(self, instance: str, state: InstanceState, reason: str) -> None:
        """Let an instance leave: by the hub if it is connected, or else by its scheduler."""
        job = self._jobs[instance]
        if job.job_id is None:
            self._end_unsent(job, InstanceState.STOPPED, reason)
            return
        if job.state is InstanceState.READY:
            try:
                self._hub.drain_instance(instance)
            except NotFound:
                self._cancel(job)
            except FabricError as error:
                logger.warning("not asked to leave: %s", error.message)
                return
        else:
            self._cancel(job)
        self._asked_at[instance] = self._now
        self._put(job.model_copy(update={"state": state, "detail": reason}))

    def _cancel_what_lingers(self) -> None:
        for instance, at in list(self._asked_at.items()):
            job = self._jobs[instance]
            if job.open and (self._now - at).total_seconds() > LEAVE_S:
                self._cancel(job)
                self._asked_at[instance] = self._now

    def _cancel(self, job: JobRecord) -> None:
        self._login.cancel(self._record, job.instance, job.job_id)

    def _end_unsent(self, job: JobRecord, state: InstanceState, detail: str) -> None:
        """End a job whose id is not known: without its spec it ends at once when it starts."""
        self._unsent.pop(job.instance, None)
        try:
            self._login.cancel(self._record, job.instance, None)
        except FabricError as error:
            logger.warning("not cancelled: %s", error.message)
        self._put(job.model_copy(update={"state": state, "detail": detail, "ended_at": self._now}))
        self._forget(self._jobs[job.instance])

    def _tell_outlook(self, outlook: Outlook) -> None:
        """Tell the hub when each instance that has not joined should: requests wait for it."""
        now = self._now
        for job in self._sorted():
            state, told_at = self._told.get(job.instance, (None, now))
            age_s = (now - told_at).total_seconds()
            if not job.open or job.ready_at is not None or job.state in LEAVING:
                continue
            if state is job.state and age_s < EXPECT_S:
                continue
            self._told[job.instance] = (job.state, now)
            starts_at = self._starts_at.get(job.instance)
            try:
                self._hub.expect_instance(
                    job.instance,
                    get_ready_in_s(job, self._record.order, now, outlook, starts_at=starts_at),
                )
            except FabricError as error:
                logger.info("the hub was not told when %s joins: %s", job.instance, error.message)

    def _abandon(self) -> None:
        """End the jobs of a launch whose folder was deleted: nobody could find them any more."""
        logger.warning("the folder of %s was deleted; its jobs are ended", self._folder.name)
        for job in filter(lambda one: one.open, self._sorted()):
            try:
                self._cancel(job)
                self._hub.end_instance(job.instance, "the folder of its launch was deleted")
            except FabricError as error:
                logger.warning("job %s is not ended: %s", job.job_id, error.message)

    def _finish(self, over: Over) -> None:
        self._write_end(InstanceState.FAILED if over.failed else InstanceState.STOPPED, over.reason)
        num_failed = sum(job.ready_at is None for job in self._sorted())
        if over.failed:
            raise JobsFailing(
                launch=self._folder.name,
                num_failures=min(num_failed, MAX_FAILURES),
                reason=over.reason.rstrip("."),
                log_path=str(self._folder.best_log(self._sorted()[-1].instance)),
            )

    def _write_end(self, state: InstanceState, detail: str) -> None:
        ended = {"state": state, "detail": detail, "ended_at": self._now}
        self._record = self._record.model_copy(update=ended)
        self._folder.write_launch(self._record)

    def _tell_charges(self) -> None:
        """Tell the hub what jobs took that have ended, each once it is known."""
        for job in self._owed():
            if job.usage is None or job.ended_at is None:
                continue
            if job.usage.elapsed_s > 0:
                try:
                    self._hub.report_job(job.instance, describe(self._record, job))
                except AuthError as error:
                    logger.warning("the hub does not take what %s took: %s", job.job_id, error)
                    self._vain.add(job.instance)
                    continue
                except FabricError as error:
                    logger.warning("the hub was not told what a job took: %s", error.message)
                    return
            self._put(job.model_copy(update={"is_told": True}))

    def _forget(self, job: JobRecord) -> None:
        """Void what is left of a job that has ended."""
        self._asked_at.pop(job.instance, None)
        try:
            failed = job.state is InstanceState.FAILED
            self._hub.end_instance(job.instance, job.detail, failed=failed)
        except FabricError as error:
            logger.info("the hub was not told: %s", error.message)

    # ---- what is kept ------------------------------------------------------------------------

    @property
    def _now(self) -> datetime:
        return self._clock()

    def _sorted(self) -> list[JobRecord]:
        return sorted(self._jobs.values(), key=lambda job: (job.submitted_at, job.replica))

    def _put(self, job: JobRecord) -> None:
        before = self._jobs.get(job.instance)
        self._jobs[job.instance] = job
        self._folder.write_job(job)
        if before is None or before.state is not job.state:
            self._changed_at = time.monotonic()
            logger.info("%s (job %s) is %s: %s", job.instance, job.job_id, job.state, job.detail)

    def _put_unseen(self, job: JobRecord, reason: str) -> None:
        if job.open and job.unseen != reason:
            self._put(job.model_copy(update={"unseen": reason}))

    def _summarize(self) -> None:
        """Keep in the launch's record how far its newest job is."""
        jobs = [job for job in self._sorted() if job.open]
        if not jobs:
            return
        ready = [job for job in jobs if job.state is InstanceState.READY]
        shown = (ready or jobs)[-1]
        record = self._record.model_copy(update={"state": shown.state, "detail": shown.remark})
        on_disk = self._folder.launch()
        if on_disk is not None and not on_disk.stop and record != self._record:
            self._record = record
            self._folder.write_launch(record)

    def _walltime_s(self) -> int:
        return self._record.order.walltime_s

    def _get_plan(self, *, fresh: bool = False) -> LaunchPlan:
        stale = fresh and time.monotonic() - self._planned_at >= FORECAST_S
        if self._plan is None or stale:
            record, ask = self._record, self._login.estimate_wait
            self._plan = get_launch_plan(record.order, record.site, self._history, ask=ask)
            self._planned_at = time.monotonic()
        return self._plan


def is_hopeless(error: FabricError) -> bool:
    """Return whether trying again cannot help: nobody but the user can mend it."""
    return isinstance(error, AuthError | UnknownModel | JobRefused)
