from __future__ import annotations

from collections.abc import Iterator

import pytest

from fabric.sdk import Fabric
from fabric.testing.scripted_hub import ScriptedHub, scripted_hub


@pytest.fixture
def hub() -> Iterator[ScriptedHub]:
    with scripted_hub() as hub:
        yield hub


@pytest.fixture
def fabric(hub: ScriptedHub) -> Iterator[Fabric]:
    with Fabric(hub.url, "sk-test", timeout_s=20) as fabric:
        yield fabric
