"""Slurm's own daemons on loopback: random ports, one folder, nothing left behind."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from fabric.errors import SettingInvalid
from fabric.testing.guarded import Guarded
from fabric.testing.ports import free_port
from fabric.testing.slurm.accounting import Accounting

START_TIMEOUT_S = 90.0
COMMAND_TIMEOUT_S = 60.0
PROGRAMS = ("munged", "slurmctld", "slurmd", "sinfo")

CONFIG = """\
ClusterName=rig
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/{gather}
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
CommunicationParameters=NoAddrCache
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=10
InactiveLimit=0
KillWait=2
OverTimeLimit=0
MinJobAge=300
{accounting}{nodes}PartitionName=debug Nodes=ALL Default=YES MaxTime=01:00:00 State=UP
PartitionName=small Nodes=n1 MaxTime=00:05:00 State=UP
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=4000\n"


@dataclass(slots=True, kw_only=True)
class Slurm:
    """A cluster of ``num_nodes`` nodes, ``n1`` on, with the partitions ``debug``
    (all of it, for an hour) and ``small`` (``n1``, for five minutes).

    Every node is this machine: two cores of its own as far as Slurm knows.

    Attributes:
        directory: Everything it writes.
        accounting: Keep accounts (slurmdbd over MariaDB), and enforce their limits.
    """

    directory: Path
    num_nodes: int = 2
    accounting: Accounting | None = None
    _nodes: dict[str, Guarded] = field(default_factory=dict, init=False)
    _munged: Guarded | None = field(default=None, init=False)
    _controller: Guarded | None = field(default=None, init=False)

    @property
    def config(self) -> Path:
        """The cluster's ``slurm.conf``."""
        return self.directory / "slurm.conf"

    @property
    def environ(self) -> dict[str, str]:
        """What Slurm's commands need to find this cluster."""
        return {"SLURM_CONF": str(self.config)}

    @property
    def node_names(self) -> list[str]:
        """Its nodes."""
        return [f"n{index + 1}" for index in range(self.num_nodes)]

    def start(self) -> None:
        """Start all daemons; return once every node is idle.

        Raises:
            SettingInvalid: Slurm is not installed.
            TimeoutError: A daemon does not come up.
        """
        for program in PROGRAMS:
            if shutil.which(program) is None and not Path(f"/usr/sbin/{program}").exists():
                raise SettingInvalid(
                    setting=program,
                    value=program,
                    reason="Slurm is not installed; run `apt-get install slurm-wlm munge`",
                )
        self._configure()
        self._munged = self._daemon(
            "munged",
            "--force",
            "--foreground",
            *("--key-file", str(self.directory / "munge.key")),
            *("--socket", str(self.directory / "munge.sock")),
            *("--pid-file", str(self.directory / "munged.pid")),
            *("--seed-file", str(self.directory / "munged.seed")),
            *("--log-file", str(self.directory / "munged.log")),
        )
        self._wait("munge", lambda: (self.directory / "munge.sock").exists())
        if self.accounting is not None:
            self.accounting.start()
        self.start_controller()
        for name in self.node_names:
            self.start_node(name)
        self._wait("its nodes", lambda: self.count("idle") == self.num_nodes)

    def close(self) -> None:
        """End everything at once, jobs included."""
        for daemon in (*self._nodes.values(), self._controller, self._munged):
            if daemon is not None:
                daemon.kill()
        for process in self._ours():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        if self.accounting is not None:
            self.accounting.close()

    def start_controller(self) -> None:
        """Start the controller, with what an earlier one left."""
        self._controller = self._daemon("slurmctld", "-D")
        self._wait("slurmctld", lambda: self.try_run("scontrol", "ping").returncode == 0)

    def stop_controller(self) -> None:
        """End the controller; jobs go on."""
        if self._controller is not None:
            self._controller.kill()
            self._controller = None

    def start_node(self, name: str) -> None:
        """Start a node's daemon."""
        self._nodes[name] = self._daemon("slurmd", "-D", "-N", name)

    def kill_node(self, name: str) -> None:
        """End a node's daemon and all that runs there, as a power cut would."""
        self._nodes.pop(name).kill()
        for process in self.processes_on(name):
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def count(self, state: str) -> int:
        """Return how many nodes are in a state, such as ``idle``."""
        done = self.try_run("sinfo", "-h", "-p", "debug", "-t", state, "-o", "%D")
        text = done.stdout.strip()
        return int(text) if done.returncode == 0 and text else 0

    def run(self, *command: str) -> str:
        """Run one of Slurm's commands and return what it printed.

        Raises:
            subprocess.CalledProcessError: It failed.
        """
        done = self.try_run(*command)
        done.check_returncode()
        return done.stdout

    def try_run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run one of Slurm's commands, which may fail."""
        return subprocess.run(
            command,
            env=os.environ | self.environ,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )

    def processes_on(self, name: str) -> list[psutil.Process]:
        """Return what jobs run on a node, the keepers of their steps left out."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                environ = process.environ()
                is_ours = environ.get("SLURM_CONF") == str(self.config)
                if is_ours and environ.get("SLURMD_NODENAME") == name:
                    found.append(process)
        return found

    def _ours(self) -> list[psutil.Process]:
        """Return what Slurm has started and no daemon's end has ended: keepers of job steps."""
        found = []
        for process in psutil.process_iter(["name"]):
            with suppress(psutil.Error):
                # Its title has overwritten its environment; it works where its daemon does.
                is_keeper = process.info["name"] == "slurmstepd"
                if is_keeper and Path(process.cwd()) == self.directory.resolve():
                    found.append(process)
        return found

    def _configure(self) -> None:
        for folder in ("state", *(f"spool-{name}" for name in self.node_names)):
            (self.directory / folder).mkdir(parents=True, exist_ok=True)
        # munged refuses a folder that others may write to, and a key that others may read.
        self.directory.chmod(0o755)
        key = self.directory / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o600)
        host = socket.gethostname().split(".")[0]
        nodes = [NODE.format(name=name, host=host, port=free_port()) for name in self.node_names]
        kept = "" if self.accounting is None else self.accounting.get_cluster_config()
        text = CONFIG.format(
            host=host,
            controller_port=free_port(),
            user="root" if os.geteuid() == 0 else os.environ["USER"],
            folder=self.directory,
            gather="none" if self.accounting is None else "linux",
            accounting=kept,
            nodes="".join(nodes),
        )
        self.config.write_text(text)

    def _daemon(self, program: str, *args: str) -> Guarded:
        path = shutil.which(program) or f"/usr/sbin/{program}"
        log = self.directory / f"{program}.log"
        return Guarded([path, *args], log, os.environ | self.environ, self.directory)

    def _wait(self, what: str, ready: Callable[[], bool]) -> None:
        until = time.monotonic() + START_TIMEOUT_S
        while not ready():
            if time.monotonic() > until:
                logs = "\n".join(
                    log.read_text(errors="replace")[-1000:] for log in self.directory.glob("*.log")
                )
                raise TimeoutError(f"{what} did not come up within {START_TIMEOUT_S} s: {logs}")
            time.sleep(0.1)


@contextmanager
def running_slurm(
    directory: Path, *, num_nodes: int = 2, accounting: bool = False
) -> Iterator[Slurm]:
    """Yield a Slurm that keeps everything in ``directory``, and end it.

    The path must be short: sockets in it have at most 108 characters.
    """
    directory.mkdir(parents=True, exist_ok=True)
    books = Accounting(directory=directory / "accounting") if accounting else None
    slurm = Slurm(directory=directory, num_nodes=num_nodes, accounting=books)
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.close()
