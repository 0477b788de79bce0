"""The demonstration on Slurm: ``python -m fabric.testing.slurm.demo``.

A cluster of two nodes, all of it on this machine; Slurm, Parsl, the hub and the model are real.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from fabric.cli import federation
from fabric.config import load_settings, load_site, shipped_sites
from fabric.errors import FabricError
from fabric.sdk import Fabric
from fabric.testing.slurm.rig import running_slurm

MACHINE = "local-slurm"
WALLTIME = "00:04:00"
NUM_STREAMS = 4
MAX_TOKENS = 24
QUESTION = "Name three planets."
KEEP_ALIVE = "20m"
HAND_OVER_TIMEOUT_S = 600.0


@dataclass(slots=True)
class Tally:
    """What the streams got while one job handed over to the next."""

    by_instance: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, instance: str) -> None:
        """Note an answer."""
        with self.lock:
            self.by_instance[instance] = self.by_instance.get(instance, 0) + 1

    def fail(self, reason: str) -> None:
        """Note a request that was not answered."""
        with self.lock:
            self.failures.append(reason)


def main() -> int:
    """Run the demonstration; return the exit code."""
    logging.basicConfig(level=logging.ERROR)
    console = Console()
    with tempfile.TemporaryDirectory(prefix="fd") as folder:
        home = Path(folder)
        with (
            console.status("Slurm starts: a controller and two nodes …") as status,
            running_slurm(home / "slurm") as slurm,
        ):
            status.update("A hub starts, with one site of its own …")
            settings = load_settings({"state_dir": home / "state", "hub.port": 0})
            template = load_site(shipped_sites()["local"])
            plan = federation.get_plan(settings, template, ["alpha"], timeout_s=300)
            running = federation.start(plan, lambda _: None)
            try:
                status.stop()
                console.print("  A hub with the site alpha, and a Slurm cluster of two nodes.")
                environ = os.environ | {
                    **slurm.environ,
                    "FABRIC_STATE_DIR": str(home / "state"),
                    "FABRIC_BASE_URL": running.base_url,
                    "FABRIC_API_KEY": running.api_key,
                }
                with Fabric(running.base_url, running.api_key) as fabric:
                    return show(console, fabric, running.model, environ)
            finally:
                federation.stop(plan.state_dir)


def show(console: Console, fabric: Fabric, model: str, environ: dict[str, str]) -> int:
    """Launch, ask, hand over and stop; return the exit code."""
    began_at = time.monotonic()
    command = ["launch", model, "--site", MACHINE, "--walltime", WALLTIME]
    command += ["--keep-alive-until", KEEP_ALIVE, "--wait"]
    console.print(f"\n[bold]$ fabric {' '.join(command)}[/]", soft_wrap=True)
    launch = json.loads(_run(environ, *command, "--format", "json"))
    name = launch["name"]
    console.print(f"  {name} is ready {time.monotonic() - began_at:.0f} s after it was asked for.")
    site = fabric.instances()[0].site
    answer = fabric.chat(QUESTION, model=model, max_tokens=MAX_TOKENS, sites=[site], temperature=0)
    console.print(
        f"  {answer.text.strip()!r}\n  at {answer.site}, for {answer.charge_usu} micro-SU"
    )

    console.print(f"\n  {NUM_STREAMS} streams at once until its walltime nears …")
    tally = Tally()
    with _streaming(fabric, model, site, tally):
        until, shown = time.monotonic() + HAND_OVER_TIMEOUT_S, ""
        while time.monotonic() < until:
            jobs = json.loads(_run(environ, "instances", name, "--format", "json"))[0]["jobs"]
            states = [job["state"] for job in jobs]
            told = ", ".join(f"job {job['job_id'] or '…'} {job['state']}" for job in jobs)
            if told != shown:
                shown = told
                console.print(f"  {told}")
            if states[0] == "stopped" and "ready" in states[1:]:
                break
            time.sleep(1)
    for job in jobs:
        served = tally.by_instance.get(job["instance"], 0)
        console.print(
            f"  job {job['job_id']}: {job['state']:8} {served:3} answers  {job['detail']}"
        )
    console.print(f"  {len(tally.failures)} requests failed.", *tally.failures[:3])

    console.print(f"\n[bold]$ fabric stop {name}[/]")
    _run(environ, "stop", name)
    handed_over = states[0] == "stopped" and len(states) > 1
    return 0 if handed_over and not tally.failures else 1


@contextmanager
def _streaming(fabric: Fabric, model: str, site: str, tally: Tally) -> Iterator[None]:
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            try:
                answer = fabric.chat(
                    QUESTION, model=model, max_tokens=MAX_TOKENS, sites=[site], temperature=0
                )
                tally.count(answer.instance)
            except FabricError as error:
                tally.fail(error.message)

    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        asking: list[Future[None]] = [pool.submit(ask) for _ in range(NUM_STREAMS)]
        try:
            yield
        finally:
            stop.set()
        for one in asking:
            one.result()


def _run(environ: dict[str, str], *args: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "fabric.cli", *args],
        env=environ,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
