from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fabric.testing.hub import RunningHub
from fabric.testing.slurm import Slurm, running_slurm
from fabric.testing.slurm.user import User


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    # Sockets have short names; pytest's folders do not.
    with tempfile.TemporaryDirectory(prefix="sl") as name, running_slurm(Path(name)) as slurm:
        yield slurm


@pytest.fixture
def user(hub: RunningHub, slurm: Slurm, tmp_path: Path) -> Iterator[User]:
    """Somebody at the cluster's login node; what they started ends with the test."""
    user = User(hub, slurm, tmp_path)
    try:
        yield user
    finally:
        user.end_all()
