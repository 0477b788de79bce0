"""What schedulers print of jobs. The outputs were recorded from Slurm 22.05 and OpenPBS 22.05."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from fabric.errors import SchedulerFailed
from fabric.launch.jobs.queue import (
    JobPhase,
    get_states,
    parse_qstat,
    parse_scontrol,
    parse_squeue,
)

SQUEUE = """\
12|RUNNING|None|2026-11-21T18:40:01
13|PENDING|Resources|2026-11-21T19:40:01
14|PENDING|Priority|N/A
15|COMPLETING|None|2026-11-21T18:39:00
"""
# The fields of `scontrol -o show job` that are read, in their order on the line.
SCONTROL = (
    "JobId=3 JobName=x UserId=root(0) JobState=TIMEOUT Reason=TimeLimit Dependency=(null)"
    " Requeue=0 Restarts=0 BatchFlag=1 Reboot=0 ExitCode=0:15 RunTime=00:01:10"
    " StartTime=2026-11-21T18:40:01 EndTime=2026-11-21T18:41:11 Deadline=N/A"
)


def test_waiting_jobs_have_their_reason_and_their_place() -> None:
    states = parse_squeue(SQUEUE)
    assert [states[job].phase for job in ("12", "13", "14", "15")] == [
        *(JobPhase.RUNNING, JobPhase.QUEUED, JobPhase.QUEUED, JobPhase.RUNNING)
    ]
    assert (states["13"].reason, states["13"].position) == ("Resources", 0)
    assert states["13"].start_at is not None
    assert (states["14"].reason, states["14"].position) == ("Priority", 1)
    assert states["14"].start_at is None


def test_a_job_that_timed_out_says_so() -> None:
    state = parse_scontrol(SCONTROL)
    assert (state.phase, state.word) == (JobPhase.ENDED, "TIMEOUT")
    assert state.reason == "TimeLimit, exit code 0:15"


@pytest.mark.parametrize("output", ["", "slurm_load_jobs error: Invalid job id specified"])
def test_a_job_that_nobody_knows_is_unknown(output: str) -> None:
    assert parse_scontrol(output).phase is JobPhase.UNKNOWN


def test_pbs_jobs_in_every_phase() -> None:
    def job(state: str, **more: object) -> dict[str, object]:
        return {"job_state": state, **more}

    listed = {
        "1.pbs": job("Q", comment="Not Running: Insufficient amount of resource: ngpus"),
        "2.pbs": job("R"),
        "3.pbs": job("F", Exit_status=271),
    }
    states = parse_qstat(json.dumps({"Jobs": listed}))
    assert [state.phase for state in states.values()] == [
        *(JobPhase.QUEUED, JobPhase.RUNNING, JobPhase.ENDED)
    ]
    assert "Insufficient" in states["1.pbs"].reason
    assert states["3.pbs"].reason == "exit status 271"


def test_a_local_job_is_its_process() -> None:
    states = get_states("local", [str(os.getpid()), "999999999"])
    assert [one.phase for one in states.values()] == [JobPhase.RUNNING, JobPhase.ENDED]


def test_a_scheduler_that_is_not_there_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SchedulerFailed, match="squeue"):
        get_states("slurm", ["1"])
