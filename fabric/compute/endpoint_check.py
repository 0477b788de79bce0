"""Checks of an endpoint's files with Globus Compute's own loader, tool and identity mapper."""

from __future__ import annotations

import json
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any
from uuid import UUID

from fabric.compute.endpoint import PLACES, allowed_functions, get_endpoint, get_endpoint_files
from fabric.compute.functions import shipped_functions
from fabric.config import ComputeExecutor, EndpointSpec, MultiUser, SiteSpec
from fabric.errors import PackageMissing

TOOL = "globus-compute-endpoint"
_RENDER_S = 120.0
"""Far more than the tool takes, about two seconds, on a busy machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one check found: it holds, or why it does not."""

    check: str
    ok: bool
    detail: str


def check_endpoint(site: SiteSpec, functions: tuple[UUID, ...] = ()) -> Iterator[Finding]:
    """Render an endpoint's files and try them, one finding at a time; takes seconds.

    Args:
        site: The site.
        functions: Allowed besides those of the site's file.

    Raises:
        SettingInvalid: The site's file has no endpoint.
        PackageMissing: Globus Compute's endpoint is not installed here.
    """
    spec = get_endpoint(site)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "endpoint"
        directory.mkdir()
        for name, text in get_endpoint_files(site, directory, functions).items():
            (directory / name).write_text(text, encoding="utf-8")
        yield _tried("config.yaml", lambda: _load_core(directory))
        for case in get_cases(spec):
            label = "options " + (json.dumps(case) if case else "left out")
            yield _tried(label, partial(_load_options, directory, case))
        yield _tried("closed schema", lambda: _refuses_worker_init(directory))
        yield _tried("functions", lambda: _known_functions(site, functions))
        if spec.multi_user:
            multi_user = spec.multi_user
            yield _tried("identity mapping", lambda: _maps(directory, multi_user))


def get_cases(spec: EndpointSpec) -> list[dict[str, str | int]]:
    """Return sets of options in which every value a caller may choose occurs, the empty first."""
    allowed = spec.options()
    columns: list[tuple[str | int, ...]] = [
        ("my-account",) if values == "any" else values for values in allowed.values()
    ]
    rows = [dict(zip(allowed, row, strict=True)) for row in zip_longest(*columns)]
    chosen = [{name: value for name, value in row.items() if value is not None} for row in rows]
    places: list[dict[str, str | int]] = [{"place": place} for place in PLACES]
    return [{}, *places, *chosen]


def render(directory: Path, options: dict[str, Any]) -> str:
    """Return what the endpoint would make of a caller's options, with its own tool.

    Raises:
        ValueError: The tool refuses; the message is the tool's.
        PackageMissing: The tool is not installed.
    """
    tool = Path(sysconfig.get_path("scripts")) / TOOL
    if not tool.exists():
        raise PackageMissing(package=TOOL, extra="site")
    done = subprocess.run(
        [tool, "-c", directory.parent, "render-user-config", "-e", directory.name, "-o", "-"],
        input=json.dumps(options),
        capture_output=True,
        text=True,
        timeout=_RENDER_S,
        check=False,
    )
    if done.returncode:
        _, _, reason = done.stderr.rpartition("Error: ")
        raise ValueError(" ".join(reason.split("\n\n")[0].split()))
    return done.stdout


def _tried(check: str, attempt: Callable[[], str]) -> Finding:
    try:
        return Finding(check=check, ok=True, detail=attempt())
    except PackageMissing:
        raise
    except Exception as error:  # whatever Globus Compute raises is what the check found
        return Finding(check=check, ok=False, detail=str(error) or type(error).__name__)


def _load_core(directory: Path) -> str:
    from globus_compute_endpoint.endpoint.config import CoreEndpointConfig
    from globus_compute_endpoint.endpoint.config.utils import get_config

    config = get_config(directory)
    if not isinstance(config, CoreEndpointConfig):
        raise TypeError("it has an engine, so the endpoint would not start")
    return f"loads as {config.display_name}"


def _load_options(directory: Path, options: dict[str, Any]) -> str:
    from globus_compute_endpoint.endpoint.config import UserEndpointConfig
    from globus_compute_endpoint.endpoint.config.utils import load_config_yaml

    config = load_config_yaml(render(directory, options))
    if not isinstance(config, UserEndpointConfig) or config.engine is None:
        raise TypeError("it has no engine, so no user endpoint would start")
    provider = type(config.engine.provider).__name__
    config.engine.shutdown()
    return f"starts blocks with {provider}"


def _refuses_worker_init(directory: Path) -> str:
    try:
        render(directory, {"worker_init": "true"})
    except ValueError as error:
        if "worker_init" in str(error):
            return "options that are not listed are refused"
        raise
    raise ValueError("a caller may say worker_init, and with it run anything before a worker")


def _known_functions(site: SiteSpec, functions: tuple[UUID, ...]) -> str:
    allowed = {*allowed_functions(site), *functions}
    if not allowed:
        raise ValueError(
            "none is allowed, so the endpoint would run nothing; register the functions with"
            " `fabric-admin function register` and name them in executor.functions"
        )
    executor = site.executor
    named = executor.functions.keys() if isinstance(executor, ComputeExecutor) else set()
    if unknown := sorted(named - shipped_functions().keys()):
        raise ValueError(
            f"executor.functions names {', '.join(unknown)}, which this release does not ship"
        )
    return f"{len(allowed)} allowed, everything else is refused"


def _maps(directory: Path, multi_user: MultiUser) -> str:
    from globus_compute_endpoint.endpoint.identity_mapper import POSIX_CONNECTOR_ID
    from globus_identity_mapping.loader import load_mappers

    document = json.loads((directory / "identity_mapping.json").read_text(encoding="utf-8"))
    (mapper,) = load_mappers(document, POSIX_CONNECTOR_ID, "fabric")
    for domain in multi_user.domains:
        identity = {"id": str(UUID(int=1)), "username": f"someone@{domain}"}
        if mapper.map_identity(identity) != "someone":
            raise ValueError(f"someone@{domain} is not mapped to the account someone")
    return f"name@{' or name@'.join(multi_user.domains)} becomes the account name"
