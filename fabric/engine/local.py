"""An engine for one Python program: to trace a model where one sits, without a hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

from fabric.engine.config import EngineConfig
from fabric.engine.source import ModelSource
from fabric.engine.torch_engine import TorchEngine


@contextmanager
def local_engine(
    source: str, config: EngineConfig | None = None, *, name: str | None = None
) -> Iterator[TorchEngine]:
    """Yield an engine over a model's files; ``fabric.trace`` takes it in place of a model's name.

    Args:
        source: ``package:<name>``, ``gguf:<file>`` or a directory; see ``ModelSource``.
        config: How it runs; float32 by default, so that numbers can be compared.
        name: What the model is called; as its source by default.

    Raises:
        ModelNotLoadable: The files are missing or of a kind that cannot be served.
    """
    with TemporaryDirectory(prefix="fabric-") as directory:

        def keep(data: bytes) -> dict[str, object]:
            """Put a result that is too large to be sent where the tracer reads it."""
            path = Path(directory, uuid4().hex)
            path.write_bytes(data)
            return {"path": str(path)}

        engine = TorchEngine(
            ModelSource.parse(source),
            config or EngineConfig(dtype="float32"),
            name=name or source,
            keep=keep,
        )
        engine.start()
        try:
            yield engine
        finally:
            engine.close()
