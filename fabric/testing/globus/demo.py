"""The demonstration over Globus Compute: ``python -m fabric.testing.globus.demo``.

The hosted service is stood in for; the SDK, the endpoint agents, the message broker, the hub and
the model are real.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import httpx
from rich.console import Console

from fabric.cli import demo
from fabric.config import load_site, shipped_sites
from fabric.testing.globus.endpoint import Endpoint
from fabric.testing.globus.federation import USER, GlobusFederation, Way, running_federation
from fabric.testing.globus.rig import Globus, running_globus

WAYS: Mapping[str, Way] = {"alpha": "session", "beta": "session"}


def main() -> int:
    """Run the demonstration; return the exit code."""
    logging.basicConfig(level=logging.ERROR)
    console = Console()
    template = load_site(shipped_sites()["local-globus"])
    began_at = time.monotonic()

    def watch(states: Mapping[str, tuple[str, str]]) -> None:
        said = ", ".join(f"{name} is {state}" for name, (state, _) in states.items())
        status.update(f"{said or 'The hub starts'} …")

    with tempfile.TemporaryDirectory(prefix="fabric-demo-") as folder:
        home = Path(folder)
        with (
            console.status("RabbitMQ and the service's stand-in start …") as status,
            running_globus(home / "globus") as globus,
        ):
            status.update("Functions are registered and two endpoints start …")
            with running_federation(globus, home, template, WAYS, watch) as federation:
                status.stop()
                console.print(
                    "  A hub, two Globus Compute endpoints, and an instance behind each:"
                    f" ready after {time.monotonic() - began_at:.0f} s."
                )
                demo.run(
                    federation.running,
                    console,
                    home / "parsl",
                    kill=lambda site: _kill(federation.endpoints[site]),
                    more_ways={
                        "Raw Globus Compute call, without our SDK": lambda: ask_raw(
                            globus, federation, "beta"
                        )
                    },
                )
    return 0


def _kill(endpoint: Endpoint) -> None:
    for process in endpoint.processes():
        process.kill()


def ask_raw(globus: Globus, federation: GlobusFederation, site: str) -> str:
    """Ask with nothing but the Globus Compute SDK, and a ticket of the hub's for the bill."""
    from globus_compute_sdk import Executor
    from globus_compute_sdk.serialize import JSONData

    running = federation.running
    headers = {"Authorization": f"Bearer {running.api_key}"}
    with httpx.Client(base_url=running.base_url, headers=headers) as hub:
        reply = hub.post("/v1/fabric/tickets", json={"site": site})
        ticket = reply.raise_for_status().json()["ticket"]
        functions = hub.get("/v1/fabric/functions").raise_for_status().json()["data"]
    infer = next(item["id"] for item in functions if item["name"] == "infer")
    question = {
        "messages": [{"role": "user", "content": demo.QUESTION}],
        "max_tokens": demo.MAX_TOKENS,
        "temperature": 0,
    }
    batch = {"model": running.model, "ticket": ticket, "tasks": [question]}
    client = globus.client(USER, data_serialization_strategy=JSONData())  # type: ignore[no-untyped-call]
    with Executor(federation.endpoints[site].id, client=client) as executor:
        future = executor.submit_to_registered_function(
            infer, args=(batch, str(federation.run_dirs[site]))
        )
        result = future.result()["results"][0]
    return str(result.get("text") or result["error"]["message"])


if __name__ == "__main__":
    sys.exit(main())
