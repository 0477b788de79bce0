"""A real endpoint agent (``globus-compute-endpoint``) and everything that runs because of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
import yaml

from fabric.testing.globus.service.records import Report
from fabric.testing.globus.service.store import Store
from fabric.testing.guarded import Guarded
from fabric.testing.processes import wait_ended

TEMPLATE = Path(__file__).parent / "template"
HOME_VARIABLE = "GLOBUS_COMPUTE_USER_DIR"
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 30.0
# What tasks inherit of this process's environment, by the start of the name.
PASSED_ON = ("FABRIC_", "HF_", "OMP_", "TOKENIZERS_", "LANG", "TMPDIR")


@dataclass(slots=True, kw_only=True)
class Endpoint:
    """An endpoint of a rig.

    Attributes:
        name: Its name on this machine.
        home: The agent's home folder, this endpoint's alone.
        environ: What makes its processes act as the owner.
        store: The service's memory.
    """

    name: str
    home: Path
    environ: Mapping[str, str] = field(repr=False)
    store: Store = field(repr=False)
    _agent: Guarded | None = field(default=None, init=False, repr=False)

    @property
    def directory(self) -> Path:
        """Its configuration and log."""
        return self.home / self.name

    @property
    def id(self) -> UUID:
        """What tasks are sent to."""
        return UUID(json.loads((self.directory / "endpoint.json").read_text())["endpoint_id"])

    @property
    def pid(self) -> int | None:
        """The core agent's process, while it runs."""
        return _read_pid(self.directory / "daemon.pid")

    @property
    def log(self) -> str:
        """What the core agent and its user endpoints logged."""
        logs = sorted(self.home.glob("*/endpoint.log"))
        return "\n".join(f"{path}\n{path.read_text(errors='replace')}" for path in logs)

    def configure(
        self,
        *,
        template: Path | None = None,
        allowed_functions: Iterable[UUID | str] | None = None,
        config: Mapping[str, Any] | None = None,
        task_environ: Mapping[str, str] | None = None,
    ) -> None:
        """Write its configuration.

        Args:
            template: A folder with ``user_config_template.yaml.j2`` and
                ``user_config_schema.json``, perhaps ``config.yaml`` and ``user_environment.yaml``;
                the rig's own by default.
            allowed_functions: The only functions it runs.
            config: What goes into ``config.yaml`` beside or instead of the rig's own.
            task_environ: What goes into the environment of tasks.
        """
        shutil.copytree(template or TEMPLATE, self.directory)
        path = self.directory / "config.yaml"
        settings: dict[str, Any] = yaml.safe_load(path.read_text()) if path.exists() else {}
        # Agents that may change users want an address; the shortest heartbeat they take is 5 s.
        settings |= {"display_name": self.name, "email": "rig@localhost", "heartbeat_period": 5}
        if allowed_functions is not None:
            settings["allowed_functions"] = [str(one) for one in allowed_functions]
        path.write_text(yaml.safe_dump(settings | dict(config or {})))
        # Agents that may change users clear the environment of their user endpoints.
        path = self.directory / "user_environment.yaml"
        variables = {k: v for k, v in os.environ.items() if k.startswith(PASSED_ON)}
        variables |= yaml.safe_load(path.read_text()) or {} if path.exists() else {}
        variables |= {"PATH": self._environ["PATH"], "CWD": str(self.home)}
        variables |= {HOME_VARIABLE: str(self.home), **(task_environ or {})}
        path.write_text(yaml.safe_dump(variables))

    def start_core(self) -> None:
        """Start the core agent and return once it is online."""
        assert self._agent is None or not self._agent.running, "it runs"
        # What the agent's own message advises after a kill.
        (self.directory / "daemon.pid").unlink(missing_ok=True)
        command = [_agent_program(), "start", self.name]
        started_at = time.time()
        self._agent = Guarded(command, self.home / "console.log", self._environ, self.home)
        self._wait_for(lambda: self.online_since(started_at), "online")

    def online_since(self, at: float = 0.0) -> bool:
        """Whether it is online, by a heartbeat that came after ``at`` (seconds of the clock)."""
        try:
            report = self.store.get(Report, str(self.id))
        except (FileNotFoundError, ValueError):
            return False  # the agent has not written its id yet, or not all of it
        return report is not None and report.at > at and report.online(time.time())

    def wait_online(self) -> None:
        """Return once the service thinks it is online.

        Raises:
            TimeoutError: It does not.
        """
        self._wait_for(self.online_since, "online")

    def wait_offline(self) -> None:
        """Return once the service thinks it is offline.

        Raises:
            TimeoutError: It does not.
        """
        self._wait_for(lambda: not self.online_since(), "offline")

    def stop_core(self) -> None:
        """Stop the agent as its owner would; it says goodbye to the service."""
        if self._agent is not None:
            self._agent.stop(STOP_TIMEOUT_S)
            self._agent = None

    def kill_core(self) -> None:
        """Kill the core agent; its user endpoints notice and stop."""
        if self._agent is not None:
            self._agent.kill()
            self._agent = None

    def user_endpoint_ids(self) -> list[UUID]:
        """Return the user endpoints that were ever started."""
        return [UUID(path.name.rpartition(".")[2]) for path in self.home.glob("uep.*")]

    def user_endpoint_pids(self) -> list[int]:
        """Return the processes of the user endpoints that run."""
        found = {_read_pid(path) for path in self.home.glob("uep.*/daemon.pid")}
        return [one.pid for one in self.processes() if one.pid in found]

    def kill_user_endpoints(self) -> list[psutil.Process]:
        """Kill the user endpoints, and return what they had started.

        Returns when the core agent has noticed, which takes it a second at most. Until then it
        drops the order to start them again, and their tasks wait for the order after that.
        """
        pids = self.user_endpoint_pids()
        started = [one for one in self.processes() if _session(one) in pids and one.pid not in pids]
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._wait_for(lambda: not any(map(psutil.pid_exists, pids)), "rid of its user endpoints")
        return started

    def processes(self) -> list[psutil.Process]:
        """Return every process that runs because of this endpoint."""
        return [one for one in psutil.process_iter() if self._is_ours(one)]

    def close(self) -> None:
        """Stop it, and end whatever it leaves."""
        self.stop_core()
        for process in (left := self.processes()):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        wait_ended(left, timeout_s=STOP_TIMEOUT_S)

    @property
    def _environ(self) -> dict[str, str]:
        programs = str(Path(sys.executable).parent)
        path = f"{programs}:{os.environ.get('PATH', os.defpath)}"
        return {**os.environ, **self.environ, HOME_VARIABLE: str(self.home), "PATH": path}

    def _is_ours(self, process: psutil.Process) -> bool:
        # Agents write their titles over their environments, tasks may leave their folder.
        try:
            home = process.environ().get(HOME_VARIABLE) or process.cwd()
            return Path(home).is_relative_to(self.home)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return False

    def _wait_for(self, condition: Callable[[], bool], state: str) -> None:
        until = time.monotonic() + START_TIMEOUT_S
        while not condition():
            ended = self._agent is not None and not self._agent.running
            if time.monotonic() > until or (ended and state == "online"):
                raise TimeoutError(f"endpoint {self.name} is not {state}:\n{self._tail()}")
            time.sleep(0.1)

    def _tail(self) -> str:
        console = self.home / "console.log"
        said = console.read_text(errors="replace") if console.exists() else ""
        return f"{said[-2000:]}\n{self.log[-4000:]}"


def _agent_program() -> str:
    return str(Path(sys.executable).with_name("globus-compute-endpoint"))


def _read_pid(path: Path) -> int | None:
    with suppress(FileNotFoundError, ValueError):
        return int(path.read_text())
    return None


def _session(process: psutil.Process) -> int | None:
    with suppress(ProcessLookupError):
        return os.getsid(process.pid)
    return None
