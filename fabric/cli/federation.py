"""A federation on this machine: a hub and local sites, started, watched and ended together."""

from __future__ import annotations

import fcntl
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from fabric.cli import processes
from fabric.config import Federation, ProcessRecord, Settings, SiteSpec, StateDir
from fabric.errors import (
    AlreadyRunning,
    BlockFailed,
    FabricError,
    HubUnreachable,
    NotRunning,
    PortInUse,
)
from fabric.messages import EngineOptions, InstanceState
from fabric.sdk import Fabric

PROJECT = "local"
KEY_LABEL = "fabric up"
GRANT_USU = 10_000_000

SiteStates = Mapping[str, tuple[str, str]]
"""Each site's state and detail."""

Watcher = Callable[[SiteStates], None]
"""Is told how far the sites are, again and again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to start: the hub's address and the sites."""

    state_dir: StateDir
    host: str
    port: int
    sites: Sequence[SiteSpec]
    timeout_s: float

    @property
    def model(self) -> str:
        """The model that is asked when none is named."""
        return self.sites[0].models[0].name


def choose_port(host: str, port: int) -> int:
    """Return ``port``, or a free one for 0.

    Raises:
        PortInUse: Another process listens there.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise PortInUse(host=host, port=port) from error
        return int(probe.getsockname()[1])


def start(plan: Plan, watch: Watcher) -> Federation:
    """Start everything and return once every site has a ready replica.

    What was started is ended again if anything fails or the caller is interrupted.

    Raises:
        AlreadyRunning: A federation is up in this state directory.
        PortInUse: The hub's port is taken.
        BlockFailed: A site gave up; the message names its log.
    """
    state = plan.state_dir
    state.create()
    with _locked(state):
        running = state.federation()
        if running is not None:
            if processes.find(running.hub) is not None:
                raise AlreadyRunning(url=running.base_url, state_dir=str(state.path))
            _end(state, running)
        port = choose_port(plan.host, plan.port)
        federation = _spawn(plan, port)
        try:
            _wait_ready(plan, federation, watch)
        except BaseException:
            _end(state, federation)
            raise
    return federation


def stop(state: StateDir) -> Federation:
    """End what runs: sites drain, then the hub ends.

    Raises:
        NotRunning: Nothing is recorded as running.
    """
    running = state.federation()
    if running is None:
        raise NotRunning(state_dir=str(state.path))
    with _locked(state):
        _end(state, running)
    return running


def restart_hub(state: StateDir, federation: Federation) -> Federation:
    """Start the hub of a federation again, at the same address, after it has ended."""
    url = httpx.URL(federation.base_url)
    hub = _spawn_hub(state, url.host, url.port or 80)
    again = federation.model_copy(update={"hub": hub})
    state.write_federation(again)
    _wait_hub(state, again, timeout_s=30)
    return again


def _end(state: StateDir, federation: Federation) -> None:
    processes.end(list(federation.sites.values()), grace_s=10)
    processes.end([federation.hub], grace_s=5)
    state.clear_federation()


@contextmanager
def _locked(state: StateDir) -> Iterator[None]:
    with state.lock_path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            running = state.federation()
            url = running.base_url if running else "an address not known yet"
            raise AlreadyRunning(url=url, state_dir=str(state.path)) from error
        yield


def _spawn(plan: Plan, port: int) -> Federation:
    from fabric.cli.seed import seed

    state = plan.state_dir
    seeded = seed(
        state.database_url, plan.sites, project=PROJECT, label=KEY_LABEL, grant_usu=GRANT_USU
    )
    base_url = f"http://{plan.host}:{port}"
    federation = Federation(
        base_url=base_url,
        api_key=seeded.api_key,
        model=plan.model,
        hub=_spawn_hub(state, plan.host, port),
        sites={},
    )
    state.write_federation(federation)
    try:
        _wait_hub(state, federation, timeout_s=30)
        for site in plan.sites:
            record = _spawn_agent(state, site, base_url, seeded.site_tokens[site.name])
            federation = federation.model_copy(
                update={"sites": {**federation.sites, site.name: record}}
            )
            state.write_federation(federation)
    except BaseException:
        _end(state, federation)
        raise
    return federation


def _spawn_hub(state: StateDir, host: str, port: int) -> ProcessRecord:
    argv = [
        *(sys.executable, "-m", "fabric.cli.admin", "hub", "-v"),
        *("--state-dir", str(state.path), "--database", state.database_url),
        *("--host", host, "--port", str(port)),
    ]
    return processes.spawn(argv, log_path=state.log_path("hub"))


def _spawn_agent(state: StateDir, site: SiteSpec, hub_url: str, token: str) -> ProcessRecord:
    from fabric.launch.agent import AgentSpec

    spec = AgentSpec(site=site, hub_url=hub_url, token=token, state_dir=state.site_dir(site.name))
    return processes.spawn(
        [sys.executable, "-m", "fabric.launch"],
        log_path=state.log_path(site.name),
        stdin=spec.model_dump_json() + "\n",
    )


def _wait_hub(state: StateDir, federation: Federation, *, timeout_s: float) -> None:
    for _ in processes.poll(timeout_s):
        if processes.find(federation.hub) is None:
            raise FabricError(
                f"The hub ended while it started: {_last_line(state.log_path('hub'))}"
                f" Its log is {state.log_path('hub')}."
            )
        try:
            if httpx.get(f"{federation.base_url}/healthz", timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            continue
    raise HubUnreachable(url=federation.base_url, reason=f"no answer in {timeout_s:g} s")


def _wait_ready(plan: Plan, federation: Federation, watch: Watcher) -> None:
    states: SiteStates = {}
    with Fabric(federation.base_url, federation.api_key) as fabric:
        for _ in processes.poll(plan.timeout_s, interval_s=0.2):
            states = {
                site.name: (site.state, site.detail)
                for site in fabric.sites()
                if site.name in federation.sites
            }
            watch(states)
            if all(state == InstanceState.READY for state, _ in states.values()):
                return
            for name, record in federation.sites.items():
                state, detail = states.get(name, ("", ""))
                ended = processes.find(record) is None
                if ended or state == InstanceState.FAILED:
                    log_path = plan.state_dir.log_path(name)
                    reason = detail or _last_line(log_path) or "its agent ended"
                    raise BlockFailed(site=name, reason=reason, log_path=str(log_path))
    waiting = ", ".join(f"{name} is {state}" for name, (state, _) in states.items())
    raise BlockFailed(
        site=waiting,
        reason=f"not ready in {plan.timeout_s:g} s; allow more with --timeout",
        log_path=str(plan.state_dir.path / "logs"),
    )


def _last_line(path: Path) -> str:
    try:
        lines = path.read_text(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1][:500] if lines else ""


def get_plan(
    settings: Settings, template: SiteSpec, names: Sequence[str], *, timeout_s: float
) -> Plan:
    """Return the plan for sites of the given names, all made like ``template``.

    The machine's cores are divided among the sites where the template leaves it open: engines that
    compete for cores are many times slower than engines that have fewer of them.
    """
    num_cores = len(os.sched_getaffinity(0)) // len(names)
    models = tuple(
        model.model_copy(update={"options": _with_threads(model.options, num_cores)})
        for model in template.models
    )
    return Plan(
        state_dir=StateDir(settings.state_dir),
        host=settings.hub.host,
        port=settings.hub.port,
        sites=[template.model_copy(update={"name": name, "models": models}) for name in names],
        timeout_s=timeout_s,
    )


def _with_threads(options: EngineOptions, num_cores: int) -> EngineOptions:
    num_ranks = options.tensor_parallel * options.pipeline_parallel
    num_threads = options.num_threads or max(1, num_cores // num_ranks)
    return options.model_copy(update={"num_threads": num_threads})
