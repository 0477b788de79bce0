"""One of each kind of store, each a real one."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from fabric.payloads import FileStore, StoreConfig
from fabric.testing.stores import running_endpoint, running_redis


@pytest.fixture(scope="package")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, StoreConfig]]:
    directory = tmp_path_factory.mktemp("stores")
    with (
        running_redis(directory / "redis") as redis,
        running_endpoint(directory / "endpoint") as endpoint,
    ):
        file = FileStore(kind="file", name="file", directory=directory / "file")
        yield {"file": file, "redis": redis, "endpoint": endpoint}


@pytest.fixture(params=["file", "redis", "endpoint"])
def config(request: pytest.FixtureRequest, configs: dict[str, StoreConfig]) -> StoreConfig:
    return configs[request.param]


@pytest.fixture
def file_config(tmp_path: Path) -> FileStore:
    return FileStore(kind="file", name="scratch", directory=tmp_path / "payloads")
