from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import pytest

from fabric.broker import BrokerSettings
from fabric.testing.hub import RunningHub, running_hub
from fabric.testing.raw_calls import GRANT_USU, RawInstance, launch


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[RunningHub]:
    """A hub whose instances are those that a test launches."""
    settings = BrokerSettings(lease_s=4.0, sweep_s=0.1)
    with running_hub(tmp_path, sites=(), grant_usu=GRANT_USU, broker=settings) as hub:
        hub.catalog.add_site("alpha")
        hub.catalog.add_site("beta")
        yield hub


@pytest.fixture(name="launch")
def launch_here(
    hub: RunningHub,
) -> Callable[..., Callable[[], AbstractContextManager[RawInstance]]]:
    return partial(launch, hub)
