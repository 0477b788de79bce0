"""An engine for one Python program: to trace a model where one sits, without a hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fabric.engine.config import EngineConfig
from fabric.engine.source import ModelSource
from fabric.engine.torch_engine import TorchEngine


@contextmanager
def local_engine(source: str, config: EngineConfig | None = None) -> Iterator[TorchEngine]:
    """Yield an engine over a model's files; ``fabric.trace`` takes it in place of a model's name.

    Args:
        source: ``package:<name>``, ``gguf:<file>`` or a directory; see ``ModelSource``.
        config: How it runs; float32 by default, so that numbers can be compared.

    Raises:
        ModelNotLoadable: The files are missing or of a kind that cannot be served.
    """
    engine = TorchEngine(
        ModelSource.parse(source), config or EngineConfig(dtype="float32"), name=source
    )
    engine.start()
    try:
        yield engine
    finally:
        engine.close()
