from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from fabric.testing.hub import RunningHub, running_hub


@pytest.fixture(scope="package")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHub]:
    with running_hub(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture
def client(hub: RunningHub) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {hub.api_key}"}
    with httpx.Client(base_url=hub.base_url, headers=headers, timeout=20) as client:
        yield client
