"""The process that watches a launch: ``python -m fabric.cli.launching LOCK FOLDER``."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from fabric.errors import FabricError
from fabric.launch.jobs import LaunchFolder, LaunchRecord
from fabric.launch.jobs.history import History
from fabric.launch.jobs.launcher import Launcher
from fabric.launch.jobs.through import get_login
from fabric.sdk import Fabric

logger = logging.getLogger(__name__)


def watch(folder: LaunchFolder, record: LaunchRecord, fabric: Fabric) -> None:
    """Watch a launch in this process until it is over.

    Raises:
        FabricError: Its jobs fail, or are refused.
    """
    root = folder.path.parent
    login = get_login(record.site, record.via, root)
    try:
        Launcher(folder, fabric, History.under(root), login).run()
    finally:
        login.close()


def start(
    folder: LaunchFolder, lock: int, *, api_key: str | None = None, project: str | None = None
) -> None:
    """Have a launch watched by a process of its own, which outlives this one and its terminal.

    Args:
        folder: The launch's.
        lock: What this process has of ``LaunchFolder.watched``; the other has it from now on.
        api_key: Its key for the hub, if it was given one.
        project: Its project, if it was given one.
    """
    environ = os.environ | {
        name: value
        for name, value in (("FABRIC_API_KEY", api_key), ("FABRIC_PROJECT", project))
        if value is not None
    }
    with folder.log_path.open("ab") as log:
        subprocess.Popen(
            [sys.executable, "-m", "fabric.cli.launching", str(lock), str(folder.path)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environ,
            pass_fds=[lock],
            start_new_session=True,
        )


def main(argv: Sequence[str]) -> int:
    """Watch the launch in a folder; return the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("fabric").setLevel(logging.INFO)
    # It warns that a job of several nodes starts on its first, which is what is meant.
    logging.getLogger("parsl.launchers").setLevel(logging.ERROR)
    lock, path = argv
    folder = LaunchFolder(Path(path))
    record = folder.launch()
    if record is None:
        logger.error("There is no launch in %s.", folder.path)
        return 1
    try:
        project = os.environ.get("FABRIC_PROJECT")
        with folder.watched(int(lock)), Fabric(record.hub_url, project=project) as fabric:
            watch(folder, record, fabric)
    except FabricError as error:
        logger.error("%s", error.message)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
