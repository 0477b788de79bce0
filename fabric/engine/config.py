"""How an engine runs. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fabric.errors import SettingInvalid


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Limits and choices of one engine.

    Args:
        dtype: Of the weights and the KV cache.
        num_threads: Threads torch uses for one operation; 0 leaves torch's default.
        cache_bytes: Memory of the KV cache.
        max_rows: The most choices that run at once.
        step_tokens: The most tokens in one step: a decoding row takes one, prefill the rest. More
            means a faster prefill and longer pauses for the rows that decode meanwhile.
        slowdown: How many times longer than decoding alone a step with prefill may take; prefill
            takes what room that leaves, but always a little.
        context_tokens: The longest row; ``None``: as long as the model allows.
        adapter_bytes: Memory of the adapters that are loaded.

    Raises:
        SettingInvalid: A number is out of range.
    """

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    num_threads: int = 0
    cache_bytes: int = 512 * 2**20
    max_rows: int = 64
    step_tokens: int = 512
    slowdown: float = 1.8
    context_tokens: int | None = None
    adapter_bytes: int = 256 * 2**20

    def __post_init__(self) -> None:
        for setting, least in (
            *(("num_threads", 0), ("cache_bytes", 1), ("max_rows", 1), ("adapter_bytes", 0)),
        ):
            if getattr(self, setting) < least:
                self._refuse(setting, f"it must be at least {least}")
        if self.step_tokens <= self.max_rows:
            self._refuse("step_tokens", "it must be over max_rows, or prefill could never run")
        if not self.slowdown >= 1.0:
            self._refuse("slowdown", "it must be at least 1")
        if self.context_tokens is not None and self.context_tokens < 1:
            self._refuse("context_tokens", "it must be at least 1")

    def _refuse(self, setting: str, reason: str) -> None:
        raise SettingInvalid(
            setting=f"engine.{setting}", value=getattr(self, setting), reason=reason
        )
