"""A federation whose sites are behind real endpoint agents, made as their administrators would."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from unittest.mock import patch
from uuid import UUID

from fabric.cli import federation as local
from fabric.compute.endpoint import get_endpoint_files
from fabric.config import ComputeExecutor, Federation, SiteSpec, StateDir, load_settings
from fabric.testing.globus.endpoint import Endpoint
from fabric.testing.globus.rig import Globus

USER = "hub"
"""Whose endpoints, functions and tasks they are."""

Way = Literal["session", "compute"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobusFederation:
    """What runs: a hub, a site agent and an endpoint for each site."""

    running: Federation
    state: StateDir
    endpoints: Mapping[str, Endpoint]
    run_dirs: Mapping[str, Path]


@contextmanager
def running_federation(
    globus: Globus,
    home: Path,
    template: SiteSpec,
    ways: Mapping[str, Way],
    watch: local.Watcher = lambda _: None,
) -> Iterator[GlobusFederation]:
    """Yield a federation once all of its sites are ready, and end all of it.

    Args:
        globus: The rig.
        home: An empty folder.
        template: The site file that all sites follow; it describes their endpoints.
        ways: The sites' names, and how the hub reaches their instances.
        watch: Is told how far they are.
    """
    state = StateDir(home / "state")
    state.create()
    with ExitStack() as stack:
        # The hub and the agents are started with this process's environment.
        stack.enter_context(patch.dict(os.environ, globus.environ(USER)))
        functions = _register(state)
        endpoints = {
            name: stack.enter_context(_endpoint(globus, name, template, functions, home))
            for name in ways
        }
        run_dirs = {name: home / "runs" / name for name in ways}
        plan = local.get_plan(
            load_settings({"state_dir": state.path, "hub.port": 0}),
            template,
            list(ways),
            timeout_s=300,
        )
        sites = [
            site.model_copy(
                update={
                    "executor": ComputeExecutor(
                        kind="globus-compute",
                        endpoint_id=endpoints[site.name].id,
                        channel=ways[site.name],
                        run_dir=str(run_dirs[site.name]),
                    )
                }
            )
            for site in plan.sites
        ]
        running = local.start(dataclasses.replace(plan, sites=sites), watch)
        stack.callback(local.stop, state)
        yield GlobusFederation(running=running, state=state, endpoints=endpoints, run_dirs=run_dirs)


def _register(state: StateDir) -> tuple[UUID, ...]:
    """Register the functions and return their ids."""
    program = [sys.executable, "-m", "fabric.cli.admin", "function"]
    database = ["--database", state.database_url]
    subprocess.run([*program, "register", *database], check=True, capture_output=True)
    listed = subprocess.run(
        [*program, "list", "--format", "json", *database], check=True, capture_output=True
    )
    return tuple(UUID(item["id"]) for item in json.loads(listed.stdout))


@contextmanager
def _endpoint(
    globus: Globus, name: str, site: SiteSpec, functions: tuple[UUID, ...], home: Path
) -> Iterator[Endpoint]:
    """Yield a site's endpoint, made from the files that its administrator would install."""
    files = home / "endpoints" / name
    files.mkdir(parents=True)
    for file, text in get_endpoint_files(site, files, functions).items():
        (files / file).write_text(text)
    with globus.endpoint(name, owner=USER, template=files) as endpoint:
        yield endpoint
