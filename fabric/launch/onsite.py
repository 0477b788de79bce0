"""What registered functions do on a worker: describe the site, start and stop its instances.

Arguments and results are JSON. ``fabric.launch.delivery`` has what runs requests, and
``fabric.launch.waits`` what asks the scheduler.
"""

from __future__ import annotations

import os
import platform
import secrets
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, BinaryIO

import psutil
from pydantic import ValidationError

import fabric
from fabric.config import load_store, load_worker
from fabric.errors import FabricError, RequestInvalid
from fabric.launch.relay import open_session
from fabric.launch.rundir import LocalInstance, RunDir
from fabric.messages import Hello, InstanceSpec, parse_from_instance

STOP_POLL_S = 0.5
"""How often the worker of an instance looks whether it was asked to stop."""

LOG_TAIL_BYTES = 4096
NVIDIA_SMI_TIMEOUT_S = 20.0


def describe_site(run_dir: str) -> dict[str, Any]:
    """Return what this worker's machine is, and the instances of the site.

    ``hello`` and ``load`` of an instance are what it answers on its direct route, or ``None`` if it
    does not, or only on another machine. What dead workers left in ``run_dir`` is removed.

    Raises:
        RequestInvalid: ``run_dir`` is not a path that may be used.
    """
    folder = RunDir(run_dir)
    return {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "fabric": fabric.__version__,
        "cpus": len(os.sched_getaffinity(0)),
        "gpus": _get_gpus(),
        "memory_bytes": psutil.virtual_memory().total,
        "job_id": load_worker().job_id,
        "run_dir": str(folder.path),
        "instances": [_describe(one) for one in folder.instances()],
    }


def start_instance(spec: Mapping[str, Any], run_dir: str) -> dict[str, Any]:
    """Run an instance as a child of this worker, and return once it has ended.

    It lives as long as this worker: it reads the end of its standard input when the worker goes.

    Args:
        spec: An ``InstanceSpec`` without ``status_path``; a guest token is chosen here if it has
            none.
        run_dir: Where its files are kept.

    Raises:
        RequestInvalid: The spec or the path cannot be used.
        AlreadyStarted: An instance of this id was started here before.
        SettingInvalid: ``run_dir`` cannot be written.
    """
    worker = load_worker()
    folder = RunDir(run_dir)
    full = _get_spec(spec, folder)
    instance = full.launch.instance
    folder.create()
    with folder.claim(instance, worker.job_id) as log:
        exit_code = _run(worker.instance_module, full, log, folder)
        status = folder.read_status(instance)
    detail = status.detail if status is not None else ""
    return {
        "instance": instance,
        "exit_code": exit_code,
        "job_id": worker.job_id,
        "host": socket.gethostname(),
        "detail": detail or f"its process ended with code {exit_code}",
        "log_tail": _read_tail(folder, instance),
    }


def stop_instance(instance: str, run_dir: str) -> dict[str, Any]:
    """Ask an instance to finish its tasks and leave; its own worker passes that on.

    Returns:
        ``stopped`` says whether there was an instance to ask. The call does not wait for its end.

    Raises:
        RequestInvalid: The id or the path cannot be used.
        SettingInvalid: ``run_dir`` cannot be written.
    """
    folder = RunDir(run_dir)
    found = folder.find(instance)
    if found is None:
        detail = f"no worker of this site runs it (run_dir {folder.path})"
        return {"instance": instance, "stopped": False, "detail": detail}
    folder.ask_to_stop(instance)
    detail = f"its worker on {found.place.host} was asked to end it"
    return {"instance": instance, "stopped": True, "detail": detail}


def replicate_version(manifest: Mapping[str, Any], run_dir: str) -> dict[str, Any]:
    """Bring the files that a manifest names to this site; see ``fabric.payloads.replicate``.

    Raises:
        RequestInvalid: ``run_dir`` is not a path that may be used.
        VersionError: The manifest, a file or its digest is not as it must be.
    """
    from fabric.payloads import PayloadStore, replicate

    folder = RunDir(run_dir)
    config = load_store(folder.path)
    if config is None:
        return dict(replicate(manifest, folder.path))
    with PayloadStore(config) as store:
        return dict(replicate(manifest, folder.path, stores=[store]))


def _get_spec(spec: Mapping[str, Any], folder: RunDir) -> InstanceSpec:
    if "status_path" in spec:
        reason = "it is chosen on site, leave it out"
        raise RequestInvalid(param="spec.status_path", value=spec["status_path"], reason=reason)
    try:
        full = InstanceSpec.model_validate({**spec, "status_path": "chosen below"})
    except ValidationError as error:
        # The value may be a secret.
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, ("spec", *first["loc"])))
        raise RequestInvalid(param=where, value="that", reason=first["msg"]) from None
    chosen = {
        "status_path": str(folder.status_path(full.launch.instance)),
        "guest_token": full.guest_token or secrets.token_urlsafe(32),
    }
    return full.model_copy(update=chosen)


def _run(module: str, spec: InstanceSpec, log: BinaryIO, folder: RunDir) -> int:
    with subprocess.Popen(
        [sys.executable, "-m", module],
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=subprocess.STDOUT,
        bufsize=0,
    ) as process:
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended already, and its log says why
            process.stdin.write(spec.model_dump_json().encode() + b"\n")
        while not folder.stop_asked(spec.launch.instance):
            with suppress(subprocess.TimeoutExpired):
                return process.wait(STOP_POLL_S)
        process.terminate()  # once: a second signal could come when nothing handles it any more
        return process.wait()


def _read_tail(folder: RunDir, instance: str) -> str:
    with folder.log_path(instance).open("rb") as log:
        log.seek(max(0, log.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
        return log.read().decode(errors="replace")


def _describe(one: LocalInstance) -> dict[str, Any]:
    described: dict[str, Any] = {"instance": one.instance, "state": "starting", "pid": 0}
    status = one.status
    if status is not None:
        described = status.model_dump(mode="json", exclude={"guest_token"})
    answer: dict[str, Any] = {"hello": None, "load": None}
    if status is not None and status.direct_url and status.guest_token and one.place.here:
        with (
            suppress(OSError, FabricError),
            open_session(status.direct_url, status.guest_token) as session,
        ):
            hello = parse_from_instance(session.hello)
            if isinstance(hello, Hello):
                answer = {
                    "hello": hello.model_dump(mode="json", exclude={"load"}),
                    "load": hello.load.model_dump(mode="json"),
                }
    return {**described, "host": one.place.host, "job_id": one.place.job_id, **answer}


def _get_gpus() -> list[dict[str, Any]]:
    """Return the GPUs that the driver shows here; none where there is no driver."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_gpus(done.stdout)


def parse_gpus(text: str) -> list[dict[str, Any]]:
    """Return the GPUs of nvidia-smi's table: names, and memory in MiB (unknown on some)."""
    gpus: list[dict[str, Any]] = []
    for line in text.splitlines():
        name, _, memory = line.rpartition(",")
        size = int(memory) * 2**20 if memory.strip().isdigit() else None
        gpus.append({"name": name.strip(), "memory_bytes": size})
    return gpus
