"""PBS's commands for tests: jobs are processes here, and the answers have the recorded form.

``$PBS_SHIM`` is a folder with one folder a job. While it has a file ``full``, jobs wait.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
QUEUES = ("workq", "debug")
KILL_DELAY_S = 10.0
POLL_S = 0.1


def qsub(args: list[str]) -> int:
    options = dict(zip(args[:-1:2], args[1:-1:2], strict=True))
    queue, script = options.get("-q", QUEUES[0]), Path(args[-1])
    if queue not in QUEUES:
        print("qsub: Unknown queue", file=sys.stderr)
        return 15018 % 256
    number = next(n for n in range(1, 10_000) if _claim(n))
    text = script.read_text()
    (walltime,) = re.findall(r"^#PBS -l walltime=(\S+)", text, re.MULTILINE)
    _write(number, queued_at=time.time(), name=script.name, queue=queue, walltime=walltime)
    keeper = subprocess.Popen(
        [sys.executable, __file__, "keep", str(number), str(script)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    (_folder(number) / "keeper").write_text(str(keeper.pid))
    print(f"{number}.pbs")
    return 0


def keep(args: list[str]) -> int:
    """Start a job when there is room, and note its end."""
    number, text = int(args[0]), Path(args[1]).read_text()
    outputs = dict(re.findall(r"^#PBS -([oe]) (\S+)", text, re.MULTILINE))
    while (_root() / "full").exists() and not _asked_to_end(number):
        time.sleep(POLL_S)
    if _asked_to_end(number):
        _write(number, ended_at=time.time())
        return 0
    with Path(outputs["o"]).open("wb") as out, Path(outputs["e"]).open("wb") as err:
        environ = os.environ | {"PBS_JOBID": f"{number}.pbs"}
        job = subprocess.Popen(
            ["bash", "-c", text], stdout=out, stderr=err, env=environ, start_new_session=True
        )
    _write(number, started_at=time.time(), pid=job.pid)
    hours, minutes, seconds = map(int, _read(number)["walltime"].split(":"))
    until = time.monotonic() + hours * 3600 + minutes * 60 + seconds
    kill_at = None
    while job.poll() is None:
        if kill_at is None and (_asked_to_end(number) or time.monotonic() > until):
            os.killpg(job.pid, signal.SIGTERM)
            kill_at = time.monotonic() + KILL_DELAY_S
        if kill_at is not None and time.monotonic() > kill_at:
            os.killpg(job.pid, signal.SIGKILL)
        time.sleep(POLL_S)
    # A job that a signal ended has its number and 256 for a status.
    status = job.returncode if job.returncode >= 0 else 256 - job.returncode
    _write(number, ended_at=time.time(), status=status)
    return 0


def qstat(args: list[str]) -> int:
    if args[0] == "-T":
        return 0
    assert args[:4] == ["-x", "-f", "-F", "json"], args
    jobs = {}
    for job_id in args[4:]:
        number = int(job_id.split(".")[0])
        if not (_folder(number) / "job.json").exists():
            print(f"qstat: Unknown Job Id {job_id}", file=sys.stderr)
            return 15001 % 256
        jobs[f"{number}.pbs"] = _describe(_read(number))
    head = {"timestamp": int(time.time()), "pbs_version": "22.05.11", "pbs_server": "pbs"}
    print(json.dumps(head | {"Jobs": jobs}, indent=4))
    return 0


def qdel(args: list[str]) -> int:
    for job_id in args:
        number = int(job_id.split(".")[0])
        if not _folder(number).exists():
            print(f"qdel: Unknown Job Id {job_id}", file=sys.stderr)
            return 15001 % 256
        (_folder(number) / "end").touch()
    return 0


def _describe(job: dict[str, Any]) -> dict[str, Any]:
    state = "finished" if "ended_at" in job else "running" if "started_at" in job else "queued"
    told: dict[str, Any] = json.loads((HERE / f"{state}.json").read_text())
    told |= {"Job_Name": job["name"], "queue": job["queue"], "ctime": _clock(job["queued_at"])}
    told["Resource_List"] |= {"nodect": 1, "walltime": job["walltime"]}
    if "started_at" in job:
        told["stime"] = _clock(job["started_at"])
    if state != "finished":
        return told
    if "started_at" not in job:
        # One that was deleted before it ran was nowhere, and used nothing.
        for name in ("resources_used", "stime", "exec_host", "exec_vnode", "run_count"):
            del told[name]
        return told | {"Exit_status": 271, "comment": "Job was deleted"}
    elapsed_s = round(job["ended_at"] - job["started_at"])
    told["resources_used"]["walltime"] = (
        f"{elapsed_s // 3600:02}:{elapsed_s // 60 % 60:02}:{elapsed_s % 60:02}"
    )
    return told | {"Exit_status": job["status"]}


def _clock(at: float) -> str:
    return time.strftime("%a %b %e %H:%M:%S %Y", time.localtime(at))


def _root() -> Path:
    return Path(os.environ["PBS_SHIM"])


def _folder(number: int) -> Path:
    return _root() / str(number)


def _claim(number: int) -> bool:
    try:
        _folder(number).mkdir()
    except FileExistsError:
        return False
    return True


def _asked_to_end(number: int) -> bool:
    return (_folder(number) / "end").exists()


def _read(number: int) -> dict[str, Any]:
    return dict(json.loads((_folder(number) / "job.json").read_text()))


def _write(number: int, **facts: object) -> None:
    path = _folder(number) / "job.json"
    known = _read(number) if path.exists() else {}
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(known | facts))
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(keep(sys.argv[2:]))
