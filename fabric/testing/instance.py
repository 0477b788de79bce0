"""``python -m fabric.testing.instance``: a real instance process around a ``FixedDelayEngine``.

The launch's source sets the engine's arguments: ``fixed-delay:token_s=0.01,first_token_s=0.05``.
"""

from __future__ import annotations

from fabric.engine.interface import Engine
from fabric.errors import ModelNotLoadable
from fabric.instance.process import Keep, main
from fabric.messages import InstanceSpec, Limits
from fabric.messages.program import MAX_INLINE_BYTES
from fabric.testing.engine import FixedDelayEngine

MODULE = "fabric.testing.instance"


def get_fixed_delay_engine(spec: InstanceSpec, keep: Keep | None = None) -> Engine:
    """Return the engine a launch's source describes.

    Args:
        spec: Its source may set ``first_token_s``, ``token_s`` (seconds), ``stop_after``,
            ``fail_after``, ``context_tokens`` (tokens), ``inline_bytes`` and ``digest``;
            ``broken=1`` does not load.
        keep: Where its large results go.
    """
    _, _, text = spec.launch.source.partition(":")
    given = dict(pair.split("=") for pair in text.split(",") if pair)
    max_rows = spec.options.max_rows
    context_tokens = int(given.get("context_tokens", 2048))
    model = spec.launch.model
    return FixedDelayEngine(
        first_token_s=float(given.get("first_token_s", 0.0)),
        token_s=float(given.get("token_s", 0.0)),
        stop_after=int(given["stop_after"]) if "stop_after" in given else None,
        fail_after=int(given["fail_after"]) if "fail_after" in given else None,
        start_error=ModelNotLoadable(model=model, reason="it was told so")
        if "broken" in given
        else None,
        model=model,
        digest=given.get("digest", "sha256:" + "0" * 64),
        limits=Limits(
            context_tokens=context_tokens,
            max_rows=max_rows,
            cache_tokens=context_tokens * max_rows,
            modes=("query", "program"),
        ),
        keep=keep,
        inline_bytes=int(given.get("inline_bytes", MAX_INLINE_BYTES)),
    )


if __name__ == "__main__":
    main(get_fixed_delay_engine)
