"""``python -m fabric.launch.jobs.inblock``: what a job runs. Starts one instance and ends with it.

The instance is told before the walltime is over, by the scheduler's signal or by this process's own
clock, so that it can leave the pool and finish what it has. A job whose instance has drained ends
with 0.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from fabric.messages import InstanceSpec

POLL_S = 0.2
LEAVE_S = 3.0
"""What an instance needs to give back what it has not finished, and to end."""

PREDICTION_SHARE = 0.5
"""The part of the time to drain within which nothing may be admitted that would end later."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the instance of a job; return the job's exit code."""
    arguments = _parse(argv)
    ends_at = _end_of_job(arguments.walltime_s)
    try:
        spec = InstanceSpec.model_validate_json(arguments.spec.read_bytes())
    except (OSError, ValueError) as error:
        print(f"The launch was ended before its job started ({error}).", file=sys.stderr)
        return 1
    warn_at = ends_at - arguments.warning_s
    # Told to the hub: what is predicted to end later is not placed here.
    serving_s = warn_at + PREDICTION_SHARE * arguments.warning_s - time.time()
    grace_s = max(0.0, arguments.warning_s - LEAVE_S)
    spec = spec.model_copy(update={"deadline_s": max(1.0, serving_s), "grace_s": grace_s})
    with arguments.log.open("ab") as log:
        instance = subprocess.Popen(
            [sys.executable, "-m", arguments.module],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    told = False

    def drain(*_: object) -> None:
        nonlocal told
        told = True
        if instance.poll() is None:
            instance.send_signal(signal.SIGTERM)

    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, drain)
    assert instance.stdin is not None
    try:
        instance.stdin.write(spec.model_dump_json().encode() + b"\n")
        instance.stdin.flush()
    except BrokenPipeError:
        pass  # it ended at once; its log says why
    while instance.poll() is None:
        if not told and time.time() >= warn_at:
            drain()
        time.sleep(POLL_S)
    return 0 if told else instance.returncode


def _end_of_job(walltime_s: float) -> float:
    """Return when the job's time is over, in epoch seconds: as the scheduler says, if it does."""
    said = os.environ.get("SLURM_JOB_END_TIME", "")
    return float(said) if said.isdecimal() else time.time() + walltime_s


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run one instance in a job.")
    parser.add_argument("spec", type=Path, help="the instance's spec; holds its token")
    parser.add_argument("log", type=Path, help="where the instance's output goes")
    parser.add_argument("--walltime-s", type=float, required=True)
    parser.add_argument("--warning-s", type=float, required=True, help="before the end")
    parser.add_argument("--module", default="fabric.instance", help="what is run")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
