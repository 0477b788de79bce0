"""``python -m fabric.instance``: an instance with an engine over torch, or over a vLLM server."""

from __future__ import annotations

from pathlib import Path

from fabric.engine.interface import Engine
from fabric.instance.process import Keep, main
from fabric.messages import InstanceSpec


def get_engine(spec: InstanceSpec, keep: Keep | None = None) -> Engine:
    """Return the engine for the model a launch describes; imports torch."""
    from fabric.engine.config import EngineConfig
    from fabric.engine.source import ModelSource

    launch = spec.launch
    source = ModelSource.parse(launch.source)
    config = EngineConfig.of(spec.options)
    if spec.options.backend == "vllm":
        from fabric.engine.vllm.engine import VllmEngine

        return VllmEngine(
            source, config, spec.options.vllm, name=launch.model, expected_digest=launch.digest
        )
    if source.embeds_sentences:
        from fabric.engine.embedding import EmbeddingEngine

        return EmbeddingEngine(source, config, name=launch.model, expected_digest=launch.digest)
    from fabric.engine.torch_engine import TorchEngine

    fetch = None
    if spec.session_url is not None:
        from fabric.instance.adapters import AdapterFiles

        directory = Path(spec.status_path).parent / "adapters"
        fetch = AdapterFiles(spec.session_url, launch.token, directory)
    return TorchEngine(
        source,
        config,
        name=launch.model,
        expected_digest=launch.digest,
        keep=keep,
        fetch_adapter=fetch,
    )


if __name__ == "__main__":
    main(get_engine)
