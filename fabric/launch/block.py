"""A block on this machine: a Parsl HighThroughputExecutor whose workers run instances."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

import fabric
from fabric.errors import BlockFailed, SettingInvalid
from fabric.launch import worker
from fabric.launch.guard import get_guarded
from fabric.messages import InstanceSpec, InstanceState, InstanceStatus

if TYPE_CHECKING:
    from parsl.executors import HighThroughputExecutor

HEARTBEAT_S = 2
"""A dead worker is noticed within one; Parsl takes whole seconds."""
HEARTBEAT_THRESHOLD_S = 15
"""A dead worker pool is noticed within it; a machine that loads weights may stand still a while."""

POLL_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchedInstance:
    """An instance in a block; ``ended`` holds its exit code once it has ended."""

    spec: InstanceSpec
    log_path: Path
    ended: Future[object]

    def status(self) -> InstanceStatus | None:
        """Return what the instance last wrote of itself, or ``None`` before that."""
        try:
            return InstanceStatus.model_validate_json(Path(self.spec.status_path).read_bytes())
        except (OSError, ValidationError):
            return None

    def stop(self) -> bool:
        """Ask the instance to finish its tasks and leave; return whether there was one to ask."""
        status = self.status()
        if status is None or self.ended.done():
            return False
        try:
            os.kill(status.pid, signal.SIGTERM)
        except ProcessLookupError:
            return False
        return True


class Block:
    """One block of a site.

    Everything in it ends with the process that made it, even when that is killed: worker pool and
    interchange run under guards, and instances read the end of their standard input.

    Args:
        site: The site's name.
        run_dir: Where Parsl and the instances write; made if missing.
        num_workers: Instances and relays at once.
        worker_init: Shell lines run before the workers start, from the site's file.
        instance_module: What ``launch`` runs, by ``python -m``.
        drain_s: How long an instance that was asked to leave may take.
    """

    poll_s = POLL_S

    def __init__(
        self,
        *,
        site: str,
        run_dir: Path,
        num_workers: int = 1,
        worker_init: str = "",
        instance_module: str = "fabric.instance",
        drain_s: float = 8.0,
    ) -> None:
        self.drain_s = drain_s
        if not re.fullmatch(r"[\w./+~-]+", str(run_dir)):
            raise SettingInvalid(
                setting="state_dir",
                value=run_dir,
                reason="Parsl's scripts take letters, digits and . / _ + ~ - in paths only",
            )
        self._site = site
        self._run_dir = run_dir.absolute()
        self._num_workers = num_workers
        self._worker_init = worker_init
        self._instance_module = instance_module
        self._executor: HighThroughputExecutor | None = None

    def start(self) -> None:
        """Start the executor and its block. Blocks for a second or two.

        Raises:
            BlockFailed: Parsl could not start its interchange or the block.
        """
        self._run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        executor = self._get_executor()
        try:
            executor.start()
        except Exception as error:
            raise self._failed(f"Parsl did not start ({error})") from error
        self._executor = executor
        self.revive()

    def revive(self) -> None:
        """Start a new block if the one before has ended; harmless otherwise.

        Raises:
            BlockFailed: The block cannot be started.
        """
        executor = self._started()
        if any(not status.terminal for status in executor.status().values()):
            return
        if not executor.scale_out_facade(1):
            reasons = [status.message for status in executor.status().values() if status.message]
            raise self._failed(reasons[-1] if reasons else "no block was started")

    def submit(self, function: Callable[..., object], *args: object) -> Future[object]:
        """Run a function of ``fabric.launch.worker`` on a worker."""
        future: Future[object] = self._started().submit(function, {}, *args)
        return future

    def launch(self, spec: InstanceSpec) -> LaunchedInstance:
        """Start an instance on a worker and return at once."""
        log_path = self._run_dir / f"{spec.launch.instance}.log"
        ended = self.submit(
            worker.run_instance, self._instance_module, spec.model_dump_json(), str(log_path)
        )
        return LaunchedInstance(spec=spec, log_path=log_path, ended=ended)

    def wait_ready(
        self,
        launched: LaunchedInstance,
        *,
        timeout_s: float,
        on_status: Callable[[InstanceStatus], None] = lambda _: None,
    ) -> InstanceStatus:
        """Block until the instance takes requests; tell every change meanwhile.

        Raises:
            BlockFailed: It ended, or was not ready in time.
        """
        until = time.monotonic() + timeout_s
        last = None
        while time.monotonic() < until:
            status = launched.status()
            if status is not None and status != last:
                on_status(status)
                last = status
            if launched.ended.done():
                reason = status.detail if status is not None else "it ended before it reported"
                raise self._failed(reason.rstrip("."), launched.log_path)
            if status is not None and status.state == InstanceState.READY:
                return status
            time.sleep(POLL_S)
        raise self._failed(f"it was not ready in {timeout_s:g} s", launched.log_path)

    def stop(self) -> None:
        """End the block and the executor; instances that still run are asked to drain and killed.

        Stop instances first (``LaunchedInstance.stop``) to let them finish. Calling it twice is
        harmless.
        """
        executor, self._executor = self._executor, None
        if executor is not None:
            executor.provider.cancel(list(executor.job_ids_to_block))
            executor.shutdown()

    def _get_executor(self) -> HighThroughputExecutor:
        # Parsl takes more than a second to import, and commands that start agents need none of it.
        from parsl.executors import HighThroughputExecutor
        from parsl.executors.high_throughput.executor import DEFAULT_LAUNCH_CMD
        from parsl.launchers import SimpleLauncher
        from parsl.providers import LocalProvider

        bin_dir = Path(sys.executable).parent
        package_root = Path(fabric.__file__).parents[1]
        environment = f"export PYTHONPATH={package_root}:$PYTHONPATH PATH={bin_dir}:$PATH"
        provider = LocalProvider(
            launcher=SimpleLauncher(),
            init_blocks=1,
            max_blocks=1,
            worker_init=f"{environment}\n{self._worker_init}",
        )
        provider.script_dir = str(self._run_dir / "scripts")
        Path(provider.script_dir).mkdir(exist_ok=True)
        guard = " ".join(get_guarded([]))
        executor = HighThroughputExecutor(
            label=self._site,
            provider=provider,
            address="127.0.0.1",
            launch_cmd=f"{guard} {DEFAULT_LAUNCH_CMD}",
            interchange_launch_cmd=get_guarded([str(bin_dir / "interchange.py")]),
            max_workers_per_node=self._num_workers,
            # Workers wait for instances most of the time, so they do not count cores.
            cores_per_worker=1e-6,
            heartbeat_period=HEARTBEAT_S,
            heartbeat_threshold=HEARTBEAT_THRESHOLD_S,
        )
        executor.run_dir = str(self._run_dir)
        return executor

    def _started(self) -> HighThroughputExecutor:
        if self._executor is None:
            raise self._failed("it has not been started, or was stopped")
        return self._executor

    def _failed(self, reason: str, log_path: Path | None = None) -> BlockFailed:
        return BlockFailed(site=self._site, reason=reason, log_path=str(log_path or self._run_dir))
