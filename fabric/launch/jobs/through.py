"""The login node by way of its Globus Compute endpoint: every call is a registered function's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import wait
from contextlib import suppress
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, Self
from uuid import UUID

from pydantic import JsonValue

from fabric.compute import ComputePool, ComputeTarget, ServiceLimits
from fabric.config import ComputeExecutor, SiteSpec
from fabric.errors import (
    EndpointOffline,
    LaunchImpossible,
    ProtocolViolation,
    ServiceBusy,
    ServiceUnreachable,
)
from fabric.launch.balances import Balance
from fabric.launch.jobs.login import LocalLogin, LoginNode, Sight
from fabric.launch.jobs.records import LaunchRecord, Via, write_whole
from fabric.messages import Failure, InstanceSpec

FUNCTIONS = (
    *("submit_job", "poll_jobs", "cancel_job", "read_job_logs"),
    *("read_balance", "estimate_wait"),
)
LIMITS = ServiceLimits(max_requests=14)
"""What a user's launchers and commands may ask together; their endpoints share the rest."""

CALL_TIMEOUT_S = 180.0
"""A user endpoint that was asleep starts first."""

LOOK_S = 5.0
"""A call that takes longer has the service asked whether the endpoint is there."""


class EndpointLogin:
    """A login node that is reached through the endpoint its user runs there.

    Args:
        site: The machine; its executor names the endpoint.
        root: Where the ids of functions that were registered from here are kept, and what was asked
            of the service.
        pool: Where tasks are submitted; closed with this.

    Raises:
        LaunchImpossible: The site's file names no endpoint.
    """

    fastest_poll_s = 3.0

    def __init__(self, site: SiteSpec, root: Path, pool: ComputePool | None = None) -> None:
        executor = site.executor
        if not isinstance(executor, ComputeExecutor):
            reason = "its file names no endpoint (executor: {kind: globus-compute, endpoint_id: …})"
            raise LaunchImpossible(param="machine", value=site.name, reason=reason)
        # An endpoint of our own templates runs functions in blocks unless it is told otherwise.
        place: dict[str, JsonValue] = {} if site.endpoint is None else {"place": "login"}
        config = place | executor.config
        self._target = ComputeTarget(endpoint_id=executor.endpoint_id, config=config)
        self._machine = site.name
        self._functions = dict(executor.functions)
        self._run_dir = executor.run_dir
        self._cache = root / "functions.json"
        self._pool = pool or ComputePool(LIMITS, shared=get_budget_path(root))

    def start(self, *, must_answer: bool = False) -> Self:
        """Open the way; register the functions that nobody has registered.

        Args:
            must_answer: Whether an endpoint that is away is an error already now.

        Raises:
            EndpointOffline: It is away.
            FabricError: Globus does not let us in, or does not answer.
        """
        self._pool.start()
        try:
            self._register()
            if must_answer:
                self._check_online()
        except BaseException:
            self._pool.close()
            raise
        return self

    def estimate_wait(self, scheduler: str, options: Mapping[str, object]) -> float | None:
        """Return the wait that the scheduler expects. See ``LoginNode.estimate_wait``."""
        expected: float | None = self._call("estimate_wait", scheduler, dict(options))["wait_s"][
            "p50"
        ]
        return expected

    def balance(self, site: SiteSpec, account: str, token: str | None = None) -> Balance:
        """Return what an account has left. See ``LoginNode.balance``."""
        told = self._call(
            "read_balance", site.model_dump(mode="json"), account, token, self._run_dir
        )
        granted, used = (
            None if told[name] is None else Decimal(told[name]) for name in ("granted", "used")
        )
        return Balance(
            unit=told["unit"],
            granted=granted,
            used=used,
            available=Decimal(told["available"]),
            as_of=datetime.fromisoformat(told["as_of"]),
        )

    def render(self, record: LaunchRecord) -> str:
        """Return the batch script. See ``LoginNode.render``."""
        return str(self._call("submit_job", _dump(record), None, self._run_dir)["script"])

    def submit(self, record: LaunchRecord, spec: InstanceSpec) -> str:
        """Submit a job. See ``LoginNode.submit``."""
        asked = spec.model_dump(mode="json")
        return str(self._call("submit_job", _dump(record), asked, self._run_dir)["job_id"])

    def look(self, record: LaunchRecord, jobs: Mapping[str, str]) -> Mapping[str, Sight]:
        """Return how jobs are. See ``LoginNode.look``."""
        told = self._call("poll_jobs", _dump(record), dict(jobs), self._run_dir)["jobs"]
        return {instance: Sight.model_validate(told[instance]) for instance in jobs}

    def cancel(self, record: LaunchRecord, instance: str, job_id: str | None) -> None:
        """End a job. See ``LoginNode.cancel``."""
        self._call("cancel_job", _dump(record), instance, job_id, self._run_dir)

    def read_logs(self, record: LaunchRecord, instance: str) -> Mapping[str, str]:
        """Return the ends of the logs. See ``LoginNode.read_logs``."""
        told = self._call("read_job_logs", _dump(record), instance, self._run_dir)["logs"]
        return {str(name): str(text) for name, text in told.items()}

    def close(self) -> None:
        """Leave. See ``LoginNode.close``."""
        self._pool.close()

    def _call(self, name: str, *args: Any) -> Any:
        future = self._pool.submit(
            self._target, self._functions[name], args, timeout_s=CALL_TIMEOUT_S
        )
        while not future.done():
            wait([future], LOOK_S)
            if not future.done():
                self._check_online()
        told = future.result()
        if not isinstance(told, dict):
            reason = f"{name} is answered with a dictionary, and it sent {type(told).__name__}"
            raise ProtocolViolation(peer=f"Endpoint {self._target.endpoint_id}", reason=reason)
        if "failure" in told:
            raise Failure.model_validate(told["failure"]).to_error()
        return told

    def _check_online(self) -> None:
        """Wait no longer for an endpoint that is not there; tasks are repeated without harm.

        Raises:
            EndpointOffline: It is not there.
        """
        endpoint = self._target.endpoint_id
        with suppress(ServiceUnreachable, ServiceBusy):
            if not self._pool.status(endpoint).online:
                raise EndpointOffline(endpoint=str(endpoint), machine=self._machine)

    def _register(self) -> None:
        """Know the functions' ids: the site's own, from before, or by registering them."""
        from fabric.compute.functions import register, shipped_function

        try:
            kept: dict[str, str] = json.loads(self._cache.read_text())
        except (OSError, ValueError):
            kept = {}
        for name in FUNCTIONS:
            if name in self._functions:
                continue
            function = shipped_function(name)
            owned = f"{name}:{function.sha256}"
            if owned not in kept:
                kept[owned] = str(register(self._pool.client, function))
                write_whole(self._cache, json.dumps(kept, indent=1))
            self._functions[name] = UUID(kept[owned])


def get_budget_path(root: Path) -> Path:
    """Return where all processes of a user count what they ask of the service."""
    return root / "requests.json"


def get_login(site: SiteSpec, via: Via, root: Path, *, must_answer: bool = False) -> LoginNode:
    """Return the way to a machine's login node, open.

    Args:
        site: The machine.
        via: Which way.
        root: Where launches are kept.
        must_answer: Whether an endpoint that is away is an error already now.

    Raises:
        LaunchImpossible: The site's file names no endpoint.
        EndpointOffline: It is away.
        FabricError: The endpoint's service does not let us in, or does not answer.
    """
    if via == "endpoint":
        return EndpointLogin(site, root).start(must_answer=must_answer)
    return LocalLogin(root)


def _dump(record: LaunchRecord) -> dict[str, Any]:
    return record.model_dump(mode="json")
