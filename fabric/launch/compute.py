"""Instances behind a Globus Compute endpoint: started, watched and stopped by registered functions.

``start_instance`` runs as long as its instance does, so its result is the instance's end. But a
task is acknowledged before it runs, and one that was running when its user endpoint was killed is
never heard of again: ``describe_site``, asked again and again, tells that an instance is gone.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from typing import Any
from uuid import UUID

from pydantic import ValidationError

from fabric.compute import ComputePool, ComputeTarget, ServiceLimits
from fabric.config import ComputeExecutor
from fabric.errors import BlockFailed, FabricError
from fabric.messages import InstanceSpec, InstanceState, InstanceStatus

NEEDED = ("describe_site", "start_instance", "stop_instance")

AGENT_REQUESTS = 4
"""An agent's part of the service's requests in a window; hub and other agents share the rest."""

DESCRIBE_S = 3.0
"""How often a site is described while one of its instances is on its way …"""
STEADY_DESCRIBE_S = 15.0
"""… and once all are ready."""
DESCRIBE_TIMEOUT_S = 60.0

STARTS_S = 60.0
"""A task that a worker has not begun so long after the site answered is lost."""

MISSES = 2
"""An instance that so many descriptions in a row do not show has ended."""

logger = logging.getLogger(__name__)


class ComputeLaunched:
    """An instance that was asked for through an endpoint."""

    def __init__(
        self,
        spec: InstanceSpec,
        endpoint_id: UUID,
        started: Future[Any],
        stop: Callable[[], object],
    ) -> None:
        self.spec = spec
        self.ended: Future[object] = Future()
        self.log_path = f"on the site, see endpoint {endpoint_id}"
        self._stop = stop
        self._status = InstanceStatus(
            instance=spec.launch.instance,
            model=spec.launch.model,
            state=InstanceState.STARTING,
            pid=0,
            detail=f"asked endpoint {endpoint_id}",
        )
        self._answered_at: float | None = None
        self._num_misses = 0
        self._seen = False
        started.add_done_callback(self._on_end)

    @property
    def ready(self) -> bool:
        """Whether the instance was ready when the site was last described."""
        return self._status.state == InstanceState.READY

    def status(self) -> InstanceStatus | None:
        """Return what the instance said when the site was last described."""
        return self._status

    def stop(self) -> bool:
        """Ask the instance to leave; return whether there was one to ask."""
        if self.ended.done():
            return False
        self._stop()
        return True

    def take(self, described: object) -> None:
        """Take what a description of the site, asked for after the launch, says of the instance.

        What is no description tells nothing, neither that the instance is there nor that it is not.
        """
        listed = described.get("instances") if isinstance(described, dict) else None
        if not isinstance(listed, list):
            logger.warning("a description of the site lists no instances")
            return
        here = {item.get("instance"): item for item in listed if isinstance(item, dict)}
        item = here.get(self.spec.launch.instance)
        if item is None:
            self._miss()
            return
        self._seen, self._num_misses = True, 0
        known = {name: item[name] for name in InstanceStatus.model_fields if name in item}
        with suppress(ValidationError):
            self._status = InstanceStatus.model_validate(known)

    def _miss(self) -> None:
        self._num_misses += 1
        self._answered_at = self._answered_at or time.monotonic()
        overdue = time.monotonic() - self._answered_at > STARTS_S
        if self._num_misses >= MISSES and (self._seen or overdue):
            what = "has gone with its worker" if self._seen else "was never started there"
            self._end(ConnectionError(f"the endpoint answers and the instance {what}"))

    def _on_end(self, started: Future[Any]) -> None:
        if started.cancelled():
            self._end(ConnectionError("the launch was cancelled"))
        elif (error := started.exception()) is not None:
            self._end(error)
        else:
            self._end(started.result())

    def _end(self, outcome: object) -> None:
        if self.ended.done():
            return
        if isinstance(outcome, BaseException):
            self.ended.set_exception(outcome)
            return
        result = outcome if isinstance(outcome, dict) else {}
        code = result.get("exit_code")
        state = InstanceState.FAILED if code else InstanceState.STOPPED
        detail = str(result.get("detail") or "")
        self._status = self._status.model_copy(update={"state": state, "detail": detail})
        self.ended.set_result(code)


class ComputeStarter:
    """Starts instances of one site through its endpoint.

    Args:
        site: The site's name.
        executor: The endpoint and how it is used.
        functions: The registered functions by name.
        pool: Where tasks are submitted; the starter closes it.
    """

    poll_s = 0.5
    drain_s = 30.0

    def __init__(
        self,
        *,
        site: str,
        executor: ComputeExecutor,
        functions: Mapping[str, UUID],
        pool: ComputePool | None = None,
    ) -> None:
        self._site = site
        self._run_dir = executor.run_dir
        self._functions = functions
        self._target = ComputeTarget(endpoint_id=executor.endpoint_id, config=executor.config)
        self._pool = pool or ComputePool(ServiceLimits(max_requests=AGENT_REQUESTS))
        self._launched: list[ComputeLaunched] = []
        self._stopped = threading.Event()
        self._watching = threading.Thread(target=self._watch, name=f"{site}-watch", daemon=True)

    def start(self) -> None:
        """Open the way to the endpoint.

        Raises:
            BlockFailed: A function is not registered, or the endpoint or the service refuses us.
        """
        if missing := [name for name in NEEDED if name not in self._functions]:
            raise self._failed(
                f"{', '.join(missing)} is not registered; run `fabric-admin function register`"
            )
        try:
            self._pool.start()
            self._pool.status(self._target.endpoint_id)
        except FabricError as error:
            raise self._failed(error.message.rstrip(".")) from error
        self._watching.start()

    def revive(self) -> None:
        """Do nothing: the endpoint starts its blocks itself."""

    def launch(self, spec: InstanceSpec) -> ComputeLaunched:
        """Ask the endpoint for an instance and return at once."""
        asked = spec.model_dump(mode="json", exclude={"status_path"})
        started = self._submit("start_instance", asked, self._run_dir)
        instance = spec.launch.instance
        launched = ComputeLaunched(
            spec,
            self._target.endpoint_id,
            started,
            stop=lambda: self._submit("stop_instance", instance, self._run_dir),
        )
        self._launched = [*self._running(), launched]
        return launched

    def stop(self) -> None:
        """Ask what still runs to leave, and close the way to the endpoint. Twice is harmless."""
        self._stopped.set()
        if self._watching.is_alive():
            self._watching.join()
        self._pool.close()

    def _submit(self, name: str, *args: Any, timeout_s: float | None = None) -> Future[Any]:
        return self._pool.submit(self._target, self._functions[name], args, timeout_s=timeout_s)

    def _watch(self) -> None:
        """Describe the site until ``stop``: often while instances come up, seldom later."""
        described_at = -STEADY_DESCRIBE_S
        while not self._stopped.wait(DESCRIBE_S):
            running = self._running()
            steady = all(launched.ready for launched in running)
            if not running or (steady and time.monotonic() - described_at < STEADY_DESCRIBE_S):
                continue
            described_at = time.monotonic()
            try:
                described = self._submit(
                    "describe_site", self._run_dir, timeout_s=DESCRIBE_TIMEOUT_S
                ).result()
            except Exception as error:  # whatever a worker raised is no reason to stop watching
                logger.info("%s was not described: %s", self._site, error)
                continue
            for launched in running:
                launched.take(described)

    def _running(self) -> list[ComputeLaunched]:
        return [launched for launched in self._launched if not launched.ended.done()]

    def _failed(self, reason: str) -> BlockFailed:
        return BlockFailed(site=self._site, reason=f"endpoint {self._target.endpoint_id}: {reason}")
