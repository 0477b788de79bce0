"""What registered functions do on a login node for a launcher elsewhere: what it does itself there.

Arguments and results are JSON. An error is an answer too: the launcher raises it again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fabric.config import SiteSpec
from fabric.errors import FabricError, RequestInvalid
from fabric.launch.jobs.login import LocalLogin
from fabric.launch.jobs.records import LaunchRecord
from fabric.launch.rundir import RunDir
from fabric.messages import Failure, InstanceSpec


def submit_job(
    launch: Mapping[str, Any], spec: Mapping[str, Any] | None, run_dir: str
) -> dict[str, Any]:
    """Submit a job for an instance, once however often it is asked; without a spec, render it.

    Args:
        launch: The ``LaunchRecord``.
        spec: The ``InstanceSpec``; its token is kept in a file of this account's alone.
        run_dir: Where launches are kept.

    Returns:
        ``job_id``, or the batch ``script``.
    """

    def submit() -> dict[str, Any]:
        login, record = _login(run_dir), LaunchRecord.model_validate(launch)
        if spec is None:
            return {"script": login.render(record)}
        return {"job_id": login.submit(record, InstanceSpec.model_validate(spec))}

    return _answer(submit)


def poll_jobs(launch: Mapping[str, Any], jobs: Mapping[str, str], run_dir: str) -> dict[str, Any]:
    """Say how jobs are, by instance (``jobs`` has their ids), as ``Sight``."""

    def look() -> dict[str, Any]:
        sights = _login(run_dir).look(LaunchRecord.model_validate(launch), jobs)
        return {"jobs": {name: one.model_dump(mode="json") for name, one in sights.items()}}

    return _answer(look)


def cancel_job(
    launch: Mapping[str, Any], instance: str, job_id: str | None, run_dir: str
) -> dict[str, Any]:
    """End the job of an instance."""

    def cancel() -> dict[str, Any]:
        _login(run_dir).cancel(LaunchRecord.model_validate(launch), instance, job_id)
        return {}

    return _answer(cancel)


def read_job_logs(launch: Mapping[str, Any], instance: str, run_dir: str) -> dict[str, Any]:
    """Return the ends of what an instance and its job have written, by file name."""

    def read() -> dict[str, Any]:
        return {"logs": _login(run_dir).read_logs(LaunchRecord.model_validate(launch), instance)}

    return _answer(read)


def read_balance(
    site: Mapping[str, Any], account: str, token: str | None, run_dir: str
) -> dict[str, Any]:
    """Return what an account has left by the centre's own commands, as ``Balance``."""

    def ask() -> dict[str, Any]:
        found = _login(run_dir).balance(SiteSpec.model_validate(site), account, token)
        amounts = (found.granted, found.used, found.available)
        granted, used, available = (None if one is None else str(one) for one in amounts)
        return {
            "unit": found.unit,
            "granted": granted,
            "used": used,
            "available": available,
            "as_of": found.as_of.isoformat(),
        }

    return _answer(ask)


def _login(run_dir: str) -> LocalLogin:
    folder = RunDir(run_dir)
    folder.create()
    return LocalLogin(Path(folder.path) / "launches")


def _answer(act: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return act()
    except ValidationError as error:
        # The value may be a secret.
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))
        invalid = RequestInvalid(param=where, value="that", reason=first["msg"])
        return {"failure": Failure.of(invalid).model_dump(mode="json")}
    except FabricError as error:
        return {"failure": Failure.of(error).model_dump(mode="json")}
