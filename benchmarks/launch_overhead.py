"""What `fabric launch` adds to the scheduler's start and the model's load, on a Slurm of its own.

In turns, on one cluster of one node that is all on this machine: the job by hand (a script with the
same instance, given to ``sbatch``), and ``fabric launch --wait``. Both count from the moment of the
command until the instance says that it is ready; ours also until the command says so and ends. What
is compared has the same scheduler, the same instance and the same hub, which it joins.

    python benchmarks/launch_overhead.py [--rounds 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import secrets
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

from fabric.config import shipped_sites
from fabric.messages import InstanceSpec, InstanceState, InstanceStatus, Launch
from fabric.sdk import Fabric
from fabric.testing.hub import PROJECT, RunningHub, running_hub
from fabric.testing.instance import MODULE
from fabric.testing.slurm import Slurm, running_slurm

MODEL = "fixed@1"
WALLTIME = "00:10:00"
TARGET_S = 3.0
PATIENCE_S = 300.0
POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Round:
    """Seconds from the command: by hand, until the job ran and until it was ready; ours.

    ``ours_cpu_s`` is what the command and the process that watches the launch have computed until
    it was told: on a busy machine the rest of ours is waiting for a core.
    """

    hand_started_s: float
    hand_ready_s: float
    ours_ready_s: float
    ours_told_s: float
    ours_cpu_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rounds, loads = [], []
    with (
        tempfile.TemporaryDirectory(prefix="lo") as name,
        running_slurm(Path(name) / "slurm", num_nodes=1) as slurm,
        running_hub(Path(name), sites=()) as hub,
    ):
        user = User(slurm, hub, Path(name))
        user.by_hand()  # files are read for the first time
        for number in range(arguments.rounds):
            loads.append(os.getloadavg()[0])
            started_s, ready_s = user.by_hand()
            one = Round(started_s, ready_s, *user.by_launch())
            rounds.append(one)
            print(
                f"round {number + 1}: by hand {one.hand_started_s:.1f} s until it ran and"
                f" {one.hand_ready_s:.1f} s until it was ready; ours {one.ours_ready_s:.1f} s, told"
                f" at {one.ours_told_s:.1f} s, {one.ours_cpu_s:.1f} s of a core"
            )
    result = summarize(rounds, loads)
    print(json.dumps(result["added_s"], indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


class User:
    """Somebody at the cluster's login node, who types both."""

    def __init__(self, slurm: Slurm, hub: RunningHub, home: Path) -> None:
        _, key = hub.keys.add_key(PROJECT, scopes=("query", "launch"))
        self.slurm, self.hub, self.home = slurm, hub, home
        sites = home / "config" / "fabric" / "sites"
        sites.mkdir(parents=True)
        shipped = yaml.safe_load(shipped_sites()["local-slurm"].read_text())
        (sites / "here.yaml").write_text(yaml.safe_dump(shipped | {"name": "here"}))
        self.environ = os.environ | {
            **slurm.environ,
            "FABRIC_BASE_URL": hub.base_url,
            "FABRIC_API_KEY": key,
            "FABRIC_STATE_DIR": str(home / "state"),
            "XDG_CONFIG_HOME": str(home / "config"),
        }
        self.fabric = Fabric(hub.base_url, key)

    def by_hand(self) -> tuple[float, float]:
        """Return the seconds until a job that was submitted by hand ran, and was ready."""
        with tempfile.TemporaryDirectory(dir=self.home) as name:
            folder = Path(name)
            launch = Launch.model_validate(self.fabric.add_instance(MODEL, "here"))
            spec = InstanceSpec(
                launch=launch,
                session_url=self.hub.session_url,
                direct_token=secrets.token_urlsafe(32),
                status_path=str(folder / "status.json"),
            )
            (folder / "spec.json").write_text(spec.model_dump_json() + "\n")
            script = folder / "job.sh"
            instance = shlex.join([sys.executable, "-m", MODULE])
            given = shlex.quote(str(folder / "spec.json"))
            script.write_text(
                "#!/bin/bash\n#SBATCH --time=10\n#SBATCH --output=/dev/null\n"
                f"date +%s.%N > {shlex.quote(str(folder / 'started'))}\n"
                f"(cat {given}; sleep 600) | {instance}\n"
            )
            began_at = time.time()
            self.slurm.run("sbatch", str(script))
            wait(lambda: is_ready(folder / "status.json"))
            ready_s = time.time() - began_at
            started_s = float((folder / "started").read_text()) - began_at
            self.end(launch.instance)
        return started_s, ready_s

    def by_launch(self) -> tuple[float, float, float]:
        """Return the seconds until a launch was ready, until its command said so, and of cores."""
        launches = self.home / "state" / "launches"
        before = set(launches.glob("l-*"))
        began_at, before_cpu_s = time.time(), of_children_s()
        command = ["launch", MODEL, "--site", "here", "--walltime", WALLTIME, "--module", MODULE]
        process = subprocess.Popen(
            [sys.executable, "-m", "fabric.cli", *command, "--wait"],
            env=self.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

        def ready() -> bool:
            folders = set(launches.glob("l-*")) - before
            return any(is_ready(path) for one in folders for path in one.glob("jobs/inst_*.json"))

        wait(ready)
        ready_s = time.time() - began_at
        name, _ = process.communicate(timeout=PATIENCE_S)
        told_s = time.time() - began_at
        cpu_s = of_children_s() - before_cpu_s + of_launcher_s(name.strip())
        stop = [sys.executable, "-m", "fabric.cli", "stop", name.strip()]
        subprocess.run(stop, env=self.environ, check=True, capture_output=True)
        wait(lambda: not self.slurm.run("squeue", "-h"))
        return ready_s, told_s, cpu_s

    def end(self, instance: str) -> None:
        """End all jobs, and what the hub knows of them."""
        for job in self.slurm.run("squeue", "-h", "-o", "%i").split():
            self.slurm.try_run("scancel", job)
        self.fabric.end_instance(instance, "measured")
        wait(lambda: not self.slurm.run("squeue", "-h") and self.slurm.count("idle") == 1)


def of_children_s() -> float:
    """Return what the ended children of this process have computed, in seconds."""
    times = os.times()
    return times.children_user + times.children_system


def of_launcher_s(name: str) -> float:
    """Return what the process that watches a launch has computed, with its children."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or ()
        if "fabric.cli.launching" in words and words[-1].endswith(name):
            return sum(process.cpu_times()[:4])
    return 0.0


def is_ready(path: Path) -> bool:
    try:
        status = InstanceStatus.model_validate_json(path.read_bytes())
    except (OSError, ValueError):
        return False
    return status.state == InstanceState.READY


def wait(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError(f"not within {PATIENCE_S:g} s")
        time.sleep(POLL_S)


def summarize(rounds: list[Round], loads: list[float]) -> dict[str, object]:
    ready = [one.ours_ready_s - one.hand_ready_s for one in rounds]
    told = [one.ours_told_s - one.hand_ready_s for one in rounds]
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load_average": [round(load, 1) for load in loads],
        "rounds": [{name: getattr(one, name) for name in Round.__slots__} for one in rounds],
        "added_s": {
            "until_ready": spread(ready),
            "until_told": spread(told),
            "target": TARGET_S,
            "cpu": spread([one.ours_cpu_s for one in rounds]),
        },
    }


def spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 2),
        "least": round(min(values), 2),
        "most": round(max(values), 2),
    }


if __name__ == "__main__":
    main()
