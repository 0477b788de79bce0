"""What Parsl workers run. Imports are inside: a worker loads only what its task needs.

Arguments and results are strings of our own JSON; the functions travel by name.
"""

from __future__ import annotations


def run_instance(module: str, spec_json: str, log_path: str) -> int:
    """Run an instance process and return its exit code.

    The instance lives as long as this worker: it reads the end of its standard input when the
    worker goes.

    Args:
        module: The module to run, ``fabric.instance``.
        spec_json: An ``InstanceSpec``.
        log_path: Where the process's output is appended.
    """
    import subprocess
    import sys
    from pathlib import Path

    with (
        Path(log_path).open("ab") as log,
        subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        assert process.stdin is not None
        process.stdin.write(spec_json.encode() + b"\n")
        process.stdin.flush()
        return process.wait()


def describe(direct_url: str, direct_token: str) -> list[str]:
    """Return an instance's ``Hello`` and ``Heartbeat`` of this moment, as JSON.

    Raises:
        ConnectionError: The instance cannot be reached.
    """
    from fabric.launch.relay import open_session

    with open_session(direct_url, direct_token) as session:
        return session.describe()


def relay(direct_url: str, direct_token: str, tasks_json: list[str]) -> list[list[str]]:
    """Run tasks at once on an instance's direct route and return the events of each, as JSON.

    Raises:
        ConnectionError: The instance cannot be reached.
    """
    from fabric.launch.relay import open_session
    from fabric.messages import Task

    tasks = [Task.model_validate_json(task_json) for task_json in tasks_json]
    with open_session(direct_url, direct_token) as session:
        return session.run(tasks)


def send(direct_url: str, direct_token: str, frame_json: str) -> None:
    """Send an instance one frame: ``Cancel`` of a task that another worker relays, or ``Drain``.

    Raises:
        ConnectionError: The instance cannot be reached.
    """
    from fabric.launch.relay import open_session

    with open_session(direct_url, direct_token) as session:
        session.send(frame_json)
