"""``python -m fabric.launch.jobs.inblock``: what a job runs, on its first node.

It brings the weights, and starts one instance here and its further ranks on the other nodes; all
end together. The instance is told before the walltime is over, by the scheduler's signal or by this
process's own clock, so that it can leave the pool and finish what it has. A job whose instance has
drained ends with 0.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import IO

from fabric.config import System, load_job
from fabric.errors import FabricError, NodeFailed
from fabric.launch.jobs.giving import giving
from fabric.launch.jobs.nodes import (
    END_S,
    NodeCommand,
    NodeProcess,
    get_address,
    get_hosts,
    meet,
)
from fabric.launch.jobs.records import LaunchFolder, LaunchRecord, write_whole
from fabric.launch.jobs.replicas import Replicas, find_replicas
from fabric.launch.jobs.stage import Stage
from fabric.messages import EngineOptions, InstanceSpec, InstanceState, InstanceStatus

POLL_S = 0.2
LEAVE_S = 3.0
"""What an instance needs to give back what it has not finished, and to end."""

EXPLAIN_S = 8.0
"""How long an instance may take to say by itself that another node's ranks are gone."""

TELL_S = 0.5
"""How often it is told how far the weights are."""

RANK_TIMEOUT_S = 60.0
"""How long a rank may be silent, where nobody says otherwise."""

PREDICTION_SHARE = 0.5
"""The part of the time to drain within which nothing may be admitted that would end later."""


class Told(Exception):
    """The job was told to end before there was an instance to drain."""


class Tenant:
    """An instance and what belongs to it, in one job.

    Args:
        spec: The instance's.
        record: Of its launch.
        ranks: Processes on each node, this one first.
        manifests: Where the digests of weights are kept between jobs.
        module: What is run for the instance, by ``python -m``.
        log: Where all of them write.
        warn_at: When the instance is told that the job ends, in epoch seconds.
    """

    def __init__(
        self,
        spec: InstanceSpec,
        record: LaunchRecord,
        *,
        ranks: Sequence[int],
        manifests: Path,
        module: str,
        log: IO[bytes],
        warn_at: float,
    ) -> None:
        assert record.site.system is not None, "a launch is planned for a machine that is known"
        self._spec = spec
        self._order = record.order
        self._hub_url = record.hub_url
        self._system: System = record.site.system
        self._ranks = tuple(ranks)
        self._manifests = manifests
        self._module = module
        self._log = log
        self._warn_at = warn_at
        self._environ = dict(os.environ)
        self._hosts: tuple[str, ...] = ()
        self._others: list[NodeProcess] = []
        self._meeting: socket.socket | None = None
        self._instance: subprocess.Popen[bytes] | None = None
        self._told = False
        self._said_at = 0.0

    def run(self) -> int:
        """Run the instance until it has ended; return the job's exit code."""
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._drain())
        try:
            job = load_job()
            alone = (job.node or socket.gethostname(),)
            self._hosts = get_hosts(job) if len(self._ranks) > 1 else alone
            source = self._bring_weights()
            with self._giving(source):
                self._start(source)
                return self._watch()
        except Told:
            self._report(InstanceState.STOPPED, "asked to end before it was started")
            return 0
        except FabricError as error:
            self._say(error.message)
            self._report(InstanceState.FAILED, error.message)
            return 1
        finally:
            for other in self._others:
                # vLLM's does not end by itself.
                other.end(0.0 if self._is_vllm else END_S)
            if self._meeting is not None:
                self._meeting.close()

    @property
    def _is_vllm(self) -> bool:
        return self._spec.options.backend == "vllm"

    def _bring_weights(self) -> str:
        stage = Stage(
            order=self._order,
            options=self._spec.options,
            system=self._system,
            host=self._hosts[0],
            ranks=self._ranks,
            manifests=self._manifests,
            run_on=self._run_on,
            say=self._say,
            tell=self._tell,
            find_replicas=self._find_replicas,
        )
        return stage.bring(self._spec.launch)

    def _find_replicas(self) -> Replicas | None:
        if self._spec.session_url is None:
            return None
        return find_replicas(self._hub_url, self._spec.launch.token, self._say)

    def _giving(self, source: str) -> AbstractContextManager[None]:
        """Give the copy that was made to the jobs that come after this one."""
        if self._spec.session_url is None:
            return nullcontext()
        return giving(
            source,
            hub_url=self._hub_url,
            token=self._spec.launch.token,
            interface=self._system.network.interface,
            say=self._say,
        )

    # ---- processes ---------------------------------------------------------------------------

    def _start(self, source: str) -> None:
        """Start the instance, and the ranks of the other nodes."""
        self._others.clear()  # what copied the weights there has ended
        launch = self._spec.launch.model_copy(update={"source": source})
        options = self._spec.options
        if len(self._ranks) > 1:
            self._meeting = self._meet()
            options = self._share(options, self._meeting)
        spec = self._spec.model_copy(update={"launch": launch, "options": options})
        if self._told:
            raise Told
        self._instance = subprocess.Popen(
            [sys.executable, "-m", self._module],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=self._environ,
            pass_fds=[options.rendezvous_fd] if options.rendezvous_fd is not None else [],
        )
        self._write(spec.model_dump_json() + "\n")
        for index in range(1, len(self._ranks)):
            self._run_on(index, self._get_agent(index, options, source))
        if self._meeting is not None and not self._is_vllm:
            self._meeting.close()  # the instance has it

    def _meet(self) -> socket.socket:
        """Return the socket at which all ranks meet; its port is nobody else's from now on."""
        if len(self._hosts) < len(self._ranks):
            what = f"{len(self._ranks)} nodes were planned, and the scheduler"
            reason = f"gave {', '.join(self._hosts)}"
            raise NodeFailed(host=self._hosts[0], what=what, reason=reason)
        interface = self._system.network.interface
        if interface is not None:
            self._environ |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
        self._address = get_address(interface)
        # vLLM takes no socket: it listens at the port itself, which is kept for it.
        return meet(self._address, listens=not self._is_vllm)

    def _share(self, options: EngineOptions, meeting: socket.socket) -> EngineOptions:
        """Return the options of the first node's processes."""
        return options.model_copy(
            update={
                "rendezvous": f"{self._address}:{meeting.getsockname()[1]}",
                "rendezvous_fd": None if self._is_vllm else meeting.fileno(),
                "local_ranks": self._ranks[0],
            }
        )

    def _get_agent(self, index: int, options: EngineOptions, source: str) -> list[str]:
        """Return what starts the ranks of another node there."""
        if self._is_vllm:
            name, given_options = self._order.model, options.model_dump_json(exclude_defaults=True)
            return [
                *(sys.executable, "-m", "fabric.engine.vllm.node", "--node-rank", str(index)),
                *("--source", source, "--name", name, "--options", given_options),
            ]
        given = {
            "--rendezvous": options.rendezvous,
            "--num-ranks": sum(self._ranks),
            "--first-rank": sum(self._ranks[:index]),
            "--local-ranks": self._ranks[index],
            "--num-threads": options.num_threads or 0,
            "--timeout-s": options.rank_timeout_s or RANK_TIMEOUT_S,
        }
        words = [str(word) for pair in given.items() for word in pair]
        return [sys.executable, "-m", "fabric.engine.partition.agent", *words]

    def _run_on(self, index: int, command: Sequence[str]) -> NodeProcess:
        """Start a command on another node; it ends with this process at the latest."""
        usual: NodeCommand = "srun" if self._system.scheduler == "slurm" else "pbsdsh"
        by = self._system.node_command or usual
        process = NodeProcess(
            by, self._hosts[index], index, command, log=self._log, environ=self._environ
        )
        self._others.append(process)
        return process

    def _watch(self) -> int:
        """Wait for the instance; end it if another node is lost and it does not see that."""
        assert self._instance is not None
        if self._told:
            self._drain()  # while it was being started
        lost_at = time.monotonic()
        while self._instance.poll() is None:
            if not self._told and time.time() >= self._warn_at:
                self._drain()
            lost = next((one for one in self._others if one.poll()), None)
            if lost is None:
                lost_at = time.monotonic()
            elif time.monotonic() - lost_at > EXPLAIN_S:
                self._end(lost)
            time.sleep(POLL_S)
        code = self._instance.returncode
        if code < 0 and not self._told:
            reason = f"its process was ended by {signal.Signals(-code).name}"
            self._report(InstanceState.FAILED, f"{reason}; most often there was no memory left")
        return 0 if self._told else code

    def _end(self, lost: NodeProcess) -> None:
        assert self._instance is not None
        assert self._instance.stdin is not None
        if self._instance.stdin.closed:
            return
        reason = f"ended with code {lost.poll()}"
        error = NodeFailed(host=lost.host, what="the processes there", reason=reason)
        self._say(error.message)
        self._write(error.message)
        self._instance.stdin.close()

    def _drain(self) -> None:
        self._told = True
        if self._instance is not None and self._instance.poll() is None:
            self._instance.send_signal(signal.SIGTERM)

    # ---- what is said ------------------------------------------------------------------------

    def _write(self, text: str) -> None:
        """Write to the instance's standard input; its log says why it does not read."""
        assert self._instance is not None
        assert self._instance.stdin is not None
        try:
            self._instance.stdin.write(text.encode())
            self._instance.stdin.flush()
        except BrokenPipeError:
            pass

    def _tell(self, detail: str) -> None:
        """Report how far the weights are.

        Raises:
            Told: The job should end.
        """
        if self._told:
            raise Told
        if time.monotonic() - self._said_at > TELL_S:
            self._said_at = time.monotonic()
            self._report(InstanceState.LOADING, detail)

    def _say(self, sentence: str) -> None:
        self._log.write(f"{sentence}\n".encode())
        self._log.flush()

    def _report(self, state: InstanceState, detail: str) -> None:
        launch = self._spec.launch
        status = InstanceStatus(
            instance=launch.instance,
            model=launch.model,
            state=state,
            pid=os.getpid(),
            detail=detail,
        )
        write_whole(Path(self._spec.status_path), status.model_dump_json())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the instance of a job; return the job's exit code."""
    arguments = _parse(argv)
    job = load_job()
    ends_at = job.ends_at or time.time() + arguments.walltime_s
    folder = LaunchFolder(arguments.spec.parents[1])
    record = folder.launch()
    try:
        spec = InstanceSpec.model_validate_json(arguments.spec.read_bytes())
    except (OSError, ValueError) as error:
        print(f"The launch was ended before its job started ({error}).", file=sys.stderr)
        return 1
    if record is None:
        print(f"There is no launch in {folder.path}.", file=sys.stderr)
        return 1
    warn_at = ends_at - arguments.warning_s
    # Told to the hub: what is predicted to end later is not placed here.
    serving_s = warn_at + PREDICTION_SHARE * arguments.warning_s - time.time()
    grace_s = max(0.0, arguments.warning_s - LEAVE_S)
    spec = spec.model_copy(update={"deadline_s": max(1.0, serving_s), "grace_s": grace_s})
    with arguments.log.open("ab") as log:
        tenant = Tenant(
            spec,
            record,
            ranks=arguments.ranks,
            manifests=folder.manifests,
            module=arguments.module,
            log=log,
            warn_at=warn_at,
        )
        return tenant.run()


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run one instance in a job.")
    parser.add_argument("spec", type=Path, help="the instance's spec; holds its token")
    parser.add_argument("log", type=Path, help="where the instance's output goes")
    parser.add_argument("--walltime-s", type=float, required=True)
    parser.add_argument("--warning-s", type=float, required=True, help="before the end")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1], help="on each node")
    parser.add_argument("--module", default="fabric.instance", help="what is run")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
