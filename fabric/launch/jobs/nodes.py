"""The nodes of a job: which they are, where they reach the first, what starts a process on others.

Everything runs on the first node; a process elsewhere is one here that stands for it.
"""

from __future__ import annotations

import shlex
import socket
import subprocess
from collections.abc import Mapping, Sequence
from typing import IO, Literal

import psutil

from fabric.config import JobEnvironment
from fabric.errors import NodeFailed, SchedulerFailed

NodeCommand = Literal["srun", "pbsdsh", "ssh"]

ASK_S = 60.0
END_S = 15.0
"""How long a process on another node may take to end by itself, and again when it is told to."""

CARRIED = (
    *("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "TMPDIR", "HF_HUB_OFFLINE", "OMP_NUM_THREADS"),
    *("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"),
)
"""Variables that commands other than srun do not take along."""


def get_hosts(job: JobEnvironment) -> tuple[str, ...]:
    """Return the names of a job's nodes, this one first.

    Raises:
        SchedulerFailed: The scheduler does not say.
    """
    if job.node_list is not None:
        try:
            done = subprocess.run(
                ["scontrol", "show", "hostnames", job.node_list],
                capture_output=True,
                text=True,
                timeout=ASK_S,
                check=True,
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise SchedulerFailed(command="scontrol show hostnames", reason=str(error)) from error
        hosts = done.stdout.split()
        return (job.node or hosts[0], *(host for host in hosts if host != (job.node or hosts[0])))
    if job.node_file is not None:
        try:
            return tuple(dict.fromkeys(job.node_file.read_text().split()))
        except OSError as error:
            raise SchedulerFailed(command=f"cat {job.node_file}", reason=str(error)) from error
    return (socket.gethostname(),)


def get_address(interface: str | None) -> str:
    """Return where other nodes reach this one: at an interface, or by its name.

    Raises:
        NodeFailed: There is no such interface here, or it has no IPv4 address.
    """
    host = socket.gethostname()
    if interface is None:
        return host
    addresses = psutil.net_if_addrs().get(interface, ())
    for address in addresses:
        if address.family == socket.AF_INET:
            return str(address.address)
    reason = "has no IPv4 address; correct `network.interface` in the machine's site file"
    raise NodeFailed(host=host, what=f"its interface {interface}", reason=reason)


def meet(host: str, *, listens: bool) -> socket.socket:
    """Return a socket bound to a free port, which nobody else is given while it is open.

    Args:
        host: An address of this node.
        listens: Whether the socket is handed on. While one does not listen, another process that
            is told of the port can listen there itself (``SO_REUSEADDR``), as vLLM does.

    Raises:
        NodeFailed: The name does not lead to this node.
    """
    meeting = socket.socket()
    try:
        meeting.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        meeting.bind((host, 0))
        if listens:
            meeting.listen()
    except OSError as error:
        meeting.close()
        reason = (
            f"is not an address of it ({error}); say `network.interface` in the machine's site file"
        )
        raise NodeFailed(host=socket.gethostname(), what=host, reason=reason) from error
    return meeting


def get_node_command(
    by: NodeCommand,
    host: str,
    index: int,
    command: Sequence[str],
    environ: Mapping[str, str],
) -> list[str]:
    """Return what runs a command on another node of this job.

    Args:
        by: What starts it.
        host: The node.
        index: Its place among the job's nodes; the first is 0.
        command: What is run there.
        environ: What it should find in its environment.
    """
    if by == "srun":
        # As many cores as the job has there, beside whatever other steps it has.
        return [
            *("srun", "--nodes=1", "--ntasks=1", f"--nodelist={host}", "--overlap"),
            *("--cpu-bind=none", "--input=none", "--unbuffered", *command),
        ]
    carried = [f"{name}={environ[name]}" for name in CARRIED if name in environ]
    full = ["env", *carried, *command]
    if by == "pbsdsh":
        return ["pbsdsh", "-n", str(index), "--", *full]
    return ["ssh", "-o", "BatchMode=yes", host, shlex.join(full)]


class NodeProcess:
    """A process on another node.

    Args:
        by: What starts it.
        host: The node.
        index: Its place among the job's nodes.
        command: What it runs.
        log: Where its output goes.
        environ: What it finds in its environment.

    Raises:
        NodeFailed: What starts it is not installed here.
    """

    def __init__(
        self,
        by: NodeCommand,
        host: str,
        index: int,
        command: Sequence[str],
        *,
        log: IO[bytes],
        environ: Mapping[str, str],
    ) -> None:
        self.host = host
        try:
            self._process = subprocess.Popen(
                get_node_command(by, host, index, command, environ),
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        except OSError as error:
            raise NodeFailed(
                host=host, what=by, reason=f"cannot be run on the job's first node ({error})"
            ) from error

    def poll(self) -> int | None:
        """Return the exit code, negative or over 128 for a signal; ``None`` while it runs."""
        return self._process.poll()

    def end(self, patience_s: float = END_S) -> None:
        """See it end: by itself within ``patience_s``, told to, or killed."""
        for step in (None, self._process.terminate, self._process.kill):
            if step is not None:
                step()
            try:
                self._process.wait(patience_s if step is None else END_S)
                return
            except subprocess.TimeoutExpired:
                continue
