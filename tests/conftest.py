"""What every test may use."""

import gc
import signal
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from fabric.testing.globus import Globus
    from fabric.testing.postgres import Postgres

# CPython 3.11 can fail with "AST constructor recursion depth mismatch" when a collection runs in
# the middle of parsing a module, and collecting tests parses hundreds.
gc.disable()

# A run in the background of a shell inherits an ignored SIGINT, and so would what tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--database postgresql`` runs on PostgreSQL what otherwise runs on SQLite."""
    parser.addoption("--database", choices=("sqlite", "postgresql"), default="sqlite")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all that waits for Globus Compute: ``make test`` runs it beside the rest."""
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if "globus" in fixtures or "globus" in item.path.stem:
            item.add_marker("globus")


def pytest_collection_finish() -> None:
    """Tests run with garbage collection, as everything else does."""
    gc.enable()


@pytest.fixture
def free_port() -> int:
    """A port on loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def globus(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Globus]":
    """A Globus Compute of this run's own, which its tests share."""
    from fabric.testing.globus import running_globus

    with running_globus(tmp_path_factory.mktemp("rig")) as running:
        yield running


@pytest.fixture(scope="session")
def postgres() -> "Iterator[Postgres]":
    """A PostgreSQL of this run's own, in which tests make databases."""
    from fabric.testing.postgres import running_postgres

    with running_postgres() as running:
        yield running
