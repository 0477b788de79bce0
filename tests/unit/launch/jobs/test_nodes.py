"""The nodes of a job, and what starts a process on one of them."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest
import torch.distributed as dist

from fabric.config import JobEnvironment, load_job
from fabric.errors import NodeFailed, SchedulerFailed
from fabric.launch.jobs.nodes import (
    NodeCommand,
    NodeProcess,
    get_address,
    get_hosts,
    get_node_command,
    meet,
)

COMMAND = ["/opt/python", "-m", "a.module", "a word"]


def test_a_job_reads_its_place_from_its_environment() -> None:
    slurm = load_job(
        {"SLURMD_NODENAME": "n1", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_END_TIME": "17"}
    )
    assert slurm == JobEnvironment(node="n1", node_list="n[1-2]", ends_at=17.0)
    assert load_job({"PBS_NODEFILE": "/x"}).node_file == Path("/x")
    assert load_job({"SLURM_JOB_END_TIME": "soon"}) == JobEnvironment()


def test_pbs_names_its_nodes_once_for_each_of_their_slots(tmp_path: Path) -> None:
    file = tmp_path / "nodes"
    file.write_text("x1.hpc\nx1.hpc\nx2.hpc\nx2.hpc\n")
    assert get_hosts(JobEnvironment(node_file=file)) == ("x1.hpc", "x2.hpc")
    with pytest.raises(SchedulerFailed, match="No such file"):
        get_hosts(JobEnvironment(node_file=tmp_path / "none"))


def test_a_process_that_is_no_job_is_its_own_node() -> None:
    assert get_hosts(JobEnvironment()) == (socket.gethostname(),)


@pytest.mark.parametrize(
    ("by", "words"),
    [
        ("srun", "srun --nodes=1 --ntasks=1 --nodelist=x2 --overlap"),
        ("pbsdsh", "pbsdsh -n 1 -- env PATH=/a:/b PYTHONPATH=/c /opt/python -m a.module"),
        ("ssh", "ssh -o BatchMode=yes x2 env PATH=/a:/b PYTHONPATH=/c /opt/python -m a.module"),
    ],
)
def test_commands_for_another_node(by: NodeCommand, words: str) -> None:
    environ = {"PATH": "/a:/b", "PYTHONPATH": "/c", "FABRIC_API_KEY": "secret"}
    command = get_node_command(by, "x2", 1, COMMAND, environ)
    assert " ".join(command).startswith(words)
    assert "secret" not in " ".join(command)
    assert command[-1].endswith("'a word'" if by == "ssh" else "a word")


def test_a_missing_command_names_the_node(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log, pytest.raises(NodeFailed, match="The node x2"):
        NodeProcess("pbsdsh", "x2", 1, COMMAND, log=log, environ={"PATH": str(tmp_path)})


def test_a_process_that_does_not_end_by_itself_is_told_to(tmp_path: Path) -> None:
    shell = tmp_path / "ssh"
    shell.write_text("#!/bin/sh\nexec sleep 600\n")
    shell.chmod(0o755)
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    with (tmp_path / "log").open("wb") as log:
        process = NodeProcess("ssh", "x2", 1, COMMAND, log=log, environ=environ)
        assert process.poll() is None
        process.end(0.0)
    assert process.poll() == -signal.SIGTERM


@pytest.mark.parametrize("listens", [True, False])
def test_ports_are_held_from_the_moment_they_are_chosen(listens: bool) -> None:
    """Two jobs on a node at once: neither can take the other's port, nor anybody else."""
    with meet("127.0.0.1", listens=listens) as first, meet("127.0.0.1", listens=listens) as second:
        assert first.getsockname() != second.getsockname()
        with pytest.raises(OSError, match="in use"), socket.socket() as thief:
            thief.bind(first.getsockname())


@pytest.mark.parametrize("by_libuv", [True, False])
def test_whoever_is_told_of_a_held_port_meets_the_others_there(by_libuv: bool) -> None:
    """As vLLM does, by torch."""
    with meet("127.0.0.1", listens=False) as held:
        at = held.getsockname()
        first = dist.TCPStore(*at, is_master=True, wait_for_workers=False, use_libuv=by_libuv)
        first.set("here", "1")
        assert dist.TCPStore(*at, is_master=False).get("here") == b"1"


def test_an_address_is_an_interfaces_or_the_nodes_name() -> None:
    assert get_address(None) == socket.gethostname()
    assert get_address("lo") == "127.0.0.1"
    with pytest.raises(NodeFailed, match=r"interface ib7 has no IPv4 address; correct `network"):
        get_address("ib7")
    with pytest.raises(NodeFailed, match=r"say `network\.interface`"):
        meet("192.0.2.77", listens=True)
