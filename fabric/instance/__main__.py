"""``python -m fabric.instance``: an instance with an engine over torch."""

from __future__ import annotations

from dataclasses import replace

from fabric.engine.interface import Engine
from fabric.instance.process import Keep, main
from fabric.messages import InstanceSpec


def get_torch_engine(spec: InstanceSpec, keep: Keep | None = None) -> Engine:
    """Return the engine for the model a launch describes; imports torch."""
    from fabric.engine.config import EngineConfig
    from fabric.engine.source import ModelSource

    launch = spec.launch
    source = ModelSource.parse(launch.source)
    config = replace(EngineConfig(), **spec.options.model_dump(exclude_none=True))
    if source.embeds_sentences:
        from fabric.engine.embedding import EmbeddingEngine

        return EmbeddingEngine(source, config, name=launch.model, expected_digest=launch.digest)
    from fabric.engine.torch_engine import TorchEngine

    return TorchEngine(source, config, name=launch.model, expected_digest=launch.digest, keep=keep)


if __name__ == "__main__":
    main(get_torch_engine)
