from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

SHIMS = Path(__file__).parents[3] / "data" / "pbs"


@pytest.fixture
def pbs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the jobs of a PBS (tests/data/pbs), whose commands are found first."""
    jobs = tmp_path / "pbs"
    jobs.mkdir()
    monkeypatch.setenv("PATH", f"{SHIMS}:{os.environ['PATH']}")
    monkeypatch.setenv("PBS_SHIM", str(jobs))
    yield jobs
    for keeper in jobs.glob("*/keeper"):
        keeper.with_name("end").touch()
        with suppress(psutil.NoSuchProcess):
            psutil.Process(int(keeper.read_text())).wait(30)
