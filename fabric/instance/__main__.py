"""``python -m fabric.instance``: an instance with the torch engine."""

from __future__ import annotations

from dataclasses import replace

from fabric.engine.interface import Engine
from fabric.instance.process import main
from fabric.messages import InstanceSpec


def get_torch_engine(spec: InstanceSpec) -> Engine:
    """Return the engine a launch describes; imports torch."""
    from fabric.engine.config import EngineConfig
    from fabric.engine.model import ModelSource
    from fabric.engine.torch_engine import TorchEngine

    launch = spec.launch
    chosen = spec.options.model_dump(exclude_none=True)
    return TorchEngine(
        ModelSource.parse(launch.source),
        replace(EngineConfig(), **chosen),
        name=launch.model,
        expected_digest=launch.digest,
    )


if __name__ == "__main__":
    main(get_torch_engine)
