from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import pytest

from fabric.broker import BrokerSettings
from fabric.testing.hub import RunningHub
from fabric.testing.raw_calls import RawInstance, launch, running_two_site_hub


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[RunningHub]:
    with running_two_site_hub(tmp_path, BrokerSettings(lease_s=4.0, sweep_s=0.1)) as hub:
        yield hub


@pytest.fixture(name="launch")
def launch_here(
    hub: RunningHub,
) -> Callable[..., Callable[[], AbstractContextManager[RawInstance]]]:
    return partial(launch, hub)
