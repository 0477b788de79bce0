"""How an engine runs. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

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
        speculation: Whether several tokens of a row may be verified at once, and who guesses them:
            ``lookup`` in the row's own text, ``model`` by ``draft_model``. Answers stay the same.
        draft_model: Source of a smaller model with the same tokenizer.

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
    speculation: Literal["off", "lookup", "model"] = "off"
    draft_model: str | None = None

    def __post_init__(self) -> None:
        for setting, least in (("num_threads", 0), ("cache_bytes", 1), ("max_rows", 1)):
            if getattr(self, setting) < least:
                self._refuse(setting, f"it must be at least {least}")
        if self.step_tokens <= self.max_rows:
            self._refuse("step_tokens", "it must be over max_rows, or prefill could never run")
        if not self.slowdown >= 1.0:
            self._refuse("slowdown", "it must be at least 1")
        if self.context_tokens is not None and self.context_tokens < 1:
            self._refuse("context_tokens", "it must be at least 1")
        for setting in ("dtype", "speculation"):
            if getattr(self, setting) not in get_args(get_type_hints(EngineConfig)[setting]):
                self._refuse(setting, "it must be one of those that the documentation names")
        if (self.speculation == "model") != (self.draft_model is not None):
            self._refuse("draft_model", "it and speculation 'model' go together")

    def _refuse(self, setting: str, reason: str) -> None:
        raise SettingInvalid(
            setting=f"engine.{setting}", value=getattr(self, setting), reason=reason
        )
