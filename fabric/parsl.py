"""An instance on the workers of a Parsl program of one's own.

::

    with fabric.parsl.instance(config, model="smollm2-135m-instruct") as client:
        print(client.complete("A quasar is", max_tokens=8).text)
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from fabric.errors import BlockFailed, NotFound
from fabric.launch import worker
from fabric.messages import EngineOptions, InstanceSpec, Launch
from fabric.sdk import Fabric

if TYPE_CHECKING:
    from parsl.config import Config

POLL_S = 0.2
LEAVE_S = 120.0
"""How long an instance may take to finish what it has."""

LIFETIME_S = 7 * 86_400.0


@contextmanager
def instance(
    config: Config | None = None,
    *,
    model: str,
    executor: str | None = None,
    machine: str = "parsl",
    sharing: str = "private",
    overflow: bool | None = None,
    options: EngineOptions = EngineOptions(),  # noqa: B008
    base_url: str | None = None,
    api_key: str | None = None,
    timeout_s: float = 3600.0,
    module: str = "fabric.instance",
) -> Iterator[Fabric]:
    """Start an instance on a worker and yield a client once it takes requests; end it after.

    The worker is the instance's until the block of code ends, so the executor needs one that is
    free. Its files are written where Parsl's worker runs; the node must reach the hub.

    Args:
        config: Parsl's configuration; ``None`` if it has been loaded.
        model: What to run: a name at the hub, or ``name@revision``.
        executor: The label of the executor; ``None`` takes any.
        machine: What the place is called in replies.
        sharing: Who may use the instance: ``private``, ``project`` or ``shared``.
        overflow: Whether requests of those whose it is may go elsewhere while it is there; by
            default they may if it is shared with all.
        options: How the engine is sized.
        base_url: The hub's address; as in ``Fabric``.
        api_key: The credential; it needs the scope ``launch``.
        timeout_s: How long to wait for a worker and the model.
        module: What the worker runs by ``python -m``.

    Raises:
        BlockFailed: The instance ended, or was not ready in time.
        FabricError: The hub refuses the launch.
    """
    import parsl

    with ExitStack() as stack:
        if config is not None:
            stack.enter_context(parsl.load(config))
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="fabric-instance-")))
        client = stack.enter_context(Fabric(base_url, api_key))
        version = next((one.id for one in client.models() if model in (one.id, one.name)), model)
        permitted = client.add_instance(
            version, machine, sharing=sharing, overflow=overflow, lifetime_s=LIFETIME_S
        )
        launch = Launch.model_validate(permitted)
        spec = InstanceSpec(
            launch=launch,
            session_url=client.base_url.rstrip("/").replace("http", "ws", 1) + launch.session_path,
            direct_token=secrets.token_urlsafe(32),
            options=options,
            status_path=str(folder / f"{launch.instance}.json"),
        )
        log = folder / f"{launch.instance}.log"
        run = parsl.python_app(worker.run_instance, executors=[executor] if executor else "all")
        ended: Future[int] = run(module, spec.model_dump_json(), str(log))
        try:
            _wait_joined(client, launch.instance, ended, log, machine, timeout_s)
            yield client
        finally:
            _end(client, launch.instance, ended)


def _wait_joined(
    client: Fabric,
    instance: str,
    ended: Future[int],
    log: Path,
    machine: str,
    timeout_s: float,
) -> None:
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        if any(one.connected for one in client.instances() if one.instance == instance):
            return
        if ended.done():
            tail = log.read_text(errors="replace").strip() if log.exists() else ""
            reason = tail.splitlines()[-1] if tail else f"its process ended ({ended.exception()})"
            raise BlockFailed(site=machine, reason=reason.rstrip("."), log_path=str(log))
        time.sleep(POLL_S)
    reason = f"it was not ready in {timeout_s:g} s; is there a free worker?"
    raise BlockFailed(site=machine, reason=reason, log_path=str(log))


def _end(client: Fabric, instance: str, ended: Future[int]) -> None:
    try:
        client.drain_instance(instance)
        until = time.monotonic() + LEAVE_S
        while not ended.done() and time.monotonic() < until:
            time.sleep(POLL_S)
    except NotFound:
        pass  # it never joined, or has gone
    client.end_instance(instance, "its Parsl program has ended")
