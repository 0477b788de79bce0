"""What every test may use."""

import gc
import socket

import pytest

# CPython 3.11 can fail with "AST constructor recursion depth mismatch" when a collection runs in
# the middle of parsing a module, and collecting tests parses hundreds.
gc.disable()


def pytest_collection_finish() -> None:
    """Tests run with garbage collection, as everything else does."""
    gc.enable()


@pytest.fixture
def free_port() -> int:
    """A port on loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
