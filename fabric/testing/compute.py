"""Pools, functions and instances on a Globus rig, in this process."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from uuid import UUID

from fabric.compute import JSON, ComputePool, ComputeTarget, RequestBudget, ServiceLimits
from fabric.compute.client import ServiceClient, get_client
from fabric.dispatch.compute import FIGURES, ComputeRelay
from fabric.dispatch.relay import RelayFigures
from fabric.launch.rundir import RunDir
from fabric.messages import InstanceSpec, InstanceState, InstanceStatus
from fabric.testing.globus import Endpoint, Globus
from fabric.testing.instance import MODULE
from fabric.testing.rig import get_spec

START_TIMEOUT_S = 120.0

TASK_ENVIRON = {"FABRIC_INSTANCE_MODULE": MODULE}
"""For ``Globus.endpoint``: its instances run a ``FixedDelayEngine``."""


@contextmanager
def acting_as(globus: Globus, user: str) -> Iterator[None]:
    """Set this process's environment to that of a user of the rig, for the block's time."""
    before = dict(os.environ)
    os.environ.update(globus.environ(user))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def get_rig_client(globus: Globus, user: str, budget: RequestBudget | None = None) -> ServiceClient:
    """Return a client of ours that acts as a user of the rig.

    The SDK has one address for services on this machine, and no argument for another one.
    """
    with acting_as(globus, user):
        known = globus.users[user]
        client = get_client(budget, client_id=known.client_id, client_secret=known.client_secret)
    web = client._compute_web_client
    for version in (web.v2, web.v3):
        version.base_url = f"{globus.url}/"
    return client


def get_rig_pool(
    globus: Globus, user: str, limits: ServiceLimits | None = None, *, shared: Path | None = None
) -> ComputePool:
    """Return a pool, not started, that acts as a user of the rig."""
    return ComputePool(limits, lambda budget: get_rig_client(globus, user, budget), shared)


def register_shipped(client: ServiceClient, name: str) -> UUID:
    """Register one of the functions that ship, as it is, and return its id."""
    folder = resources.files("fabric.endpoints.functions")
    source = (folder / f"{name}.py").read_text(encoding="utf-8")
    return UUID(client.register_source_code(source, name))


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeInstance:
    """An instance that runs on a worker of an endpoint."""

    spec: InstanceSpec
    status: InstanceStatus
    ended: Future[JSON]

    def kill(self) -> None:
        """End it as a power cut would."""
        with suppress(ProcessLookupError):
            os.kill(self.status.pid, signal.SIGKILL)


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeSite:
    """An endpoint as a site: its functions are registered, its files are in ``run_dir``."""

    pool: ComputePool
    target: ComputeTarget
    start_id: UUID
    infer_id: UUID
    run_dir: Path

    @classmethod
    def get(
        cls,
        pool: ComputePool,
        endpoint: Endpoint,
        run_dir: Path,
        config: Mapping[str, JSON] | None = None,
    ) -> ComputeSite:
        """Return the site behind an endpoint that the pool's identity may use."""
        return cls(
            pool=pool,
            target=ComputeTarget(endpoint_id=endpoint.id, config=config or {}),
            start_id=register_shipped(pool.client, "start_instance"),
            infer_id=register_shipped(pool.client, "infer"),
            run_dir=run_dir,
        )

    @contextmanager
    def instance(
        self, engine: str = "", *, max_rows: int = 16, session_url: str | None = None
    ) -> Iterator[ComputeInstance]:
        """Start an instance by ``start_instance``, yield it once it is ready, and kill it.

        Args:
            engine: The engine's arguments, ``token_s=0.01``.
            max_rows: Rows it runs at once.
            session_url: The hub's session route, if it is to dial.

        Raises:
            TimeoutError: It is not ready after two minutes, or has ended.
        """
        spec = get_spec(self.run_dir, engine=engine, max_rows=max_rows, session_url=session_url)
        asked = spec.model_dump(mode="json", exclude={"status_path"})
        ended = self.pool.submit(self.target, self.start_id, (asked, str(self.run_dir)))
        run_dir = RunDir(str(self.run_dir))
        until = time.monotonic() + START_TIMEOUT_S
        while (
            status := run_dir.read_status(spec.launch.instance)
        ) is None or status.state != InstanceState.READY:
            if ended.done() or time.monotonic() > until:
                raise TimeoutError(f"the instance is {status}, and its task {ended}")
            time.sleep(0.05)
        instance = ComputeInstance(spec=spec, status=status, ended=ended)
        try:
            yield instance
        finally:
            instance.kill()

    def get_relay(self, instance: ComputeInstance, figures: RelayFigures = FIGURES) -> ComputeRelay:
        """Return a relay to an instance of this site."""
        return ComputeRelay(
            self.pool,
            self.target,
            self.infer_id,
            instance=instance.spec.launch.instance,
            direct_token=instance.spec.direct_token,
            run_dir=str(self.run_dir),
            figures=figures,
        )
