"""What an instance says of a task: accepted, tokens or an embedding, then finished or failed."""

from __future__ import annotations

import base64
import math
import sys
from array import array
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field, field_validator

from fabric.errors import FabricError
from fabric.messages.nodes import Name
from fabric.messages.program import MAX_INLINE_BYTES
from fabric.messages.tools import ToolCallPart
from fabric.messages.wire import Wire

FinishReason = Literal["stop", "length", "tool_calls"]

MAX_DIMENSIONS = 2**16
"""The longest embedding that travels."""


class Usage(Wire):
    """What one attempt consumed. The engine knows no prices.

    ``prompt_tokens`` counts the prompt once, whatever ``n`` is; ``output_tokens`` sums over
    choices. Of ``drafted_tokens``, guessed in speculation, ``accepted_tokens`` became output.
    ``hook_bytes_in`` are a program's constants and artifacts, ``hook_bytes_out`` what it
    saved. ``device_s`` is the attempt's share of the engine's steps: each step's seconds divided
    among its rows by their tokens; ``kv_block_s`` sums the steps' seconds times the blocks of 16
    tokens that its rows kept in the cache; ``adapter_s`` are its share of the seconds that the slot
    of its adapter was in use, divided among the attempts that used it.
    """

    prompt_tokens: int = Field(default=0, ge=0)
    cached_prompt_tokens: int = Field(default=0, ge=0)
    output_tokens: int = Field(default=0, ge=0)
    drafted_tokens: int = Field(default=0, ge=0)
    accepted_tokens: int = Field(default=0, ge=0)
    hook_bytes_in: int = Field(default=0, ge=0)
    hook_bytes_out: int = Field(default=0, ge=0)
    queue_s: float = Field(default=0.0, ge=0.0)
    device_s: float = Field(default=0.0, ge=0.0)
    kv_block_s: float = Field(default=0.0, ge=0.0)
    adapter_s: float = Field(default=0.0, ge=0.0)


class Failure(Wire):
    """An error as it crosses processes."""

    code: str
    message: str
    detail: dict[str, object] = {}

    @staticmethod
    def of(error: FabricError) -> Failure:
        """Return ``error`` in its wire form."""
        return Failure(code=error.code, message=error.message, detail=error.detail)

    def to_error(self) -> FabricError:
        """Return the error again, in the class its code belongs to."""
        return FabricError.rebuild(self.code, self.message, self.detail)


class TopLogprob(Wire):
    """One alternative: its text, id and natural-log probability."""

    token_id: int
    text: str
    logprob: float


class ScoredToken(Wire):
    """A prompt token; the first has no log probability, because nothing precedes it."""

    token_id: int
    text: str
    logprob: float | None
    top_logprobs: tuple[TopLogprob, ...] = ()


class _TaskEvent(Wire):
    task_id: str
    attempt: int


class Accepted(_TaskEvent):
    """The instance has tokenized the prompt and queued it."""

    type: Literal["accepted"] = "accepted"
    prompt_tokens: int


class PromptScored(_TaskEvent):
    """The prompt's tokens with their log probabilities (asked for by ``prompt_logprobs``)."""

    type: Literal["prompt_scored"] = "prompt_scored"
    tokens: tuple[ScoredToken, ...]


class Token(_TaskEvent):
    """One generated token of one choice.

    ``position`` counts generated tokens of the choice from 0. ``text`` is what became readable
    with this token: empty while a character or a possible stop string is incomplete.
    ``token_text`` is the token alone (for log probabilities). Where tools are offered, ``text`` is
    what is no call, and ``tool_calls`` what became readable of calls. The last token of a choice
    carries ``finish_reason``; an end-of-sequence token has an empty ``text``.
    """

    type: Literal["token"] = "token"
    choice: int
    position: int
    token_id: int
    text: str
    token_text: str = ""
    tool_calls: tuple[ToolCallPart, ...] = ()
    logprob: float | None = None
    top_logprobs: tuple[TopLogprob, ...] = ()
    finish_reason: FinishReason | None = None


class Embedding(_TaskEvent):
    """The prompt as one vector of length 1; the only result of a task of mode ``embed``.

    ``data`` packs it as the OpenAI API does: base64 over little-endian float32.
    """

    type: Literal["embedding"] = "embedding"
    data: str = Field(min_length=1, max_length=-(-4 * MAX_DIMENSIONS // 3) * 4)

    @field_validator("data")
    @classmethod
    def _holds_a_vector(cls, data: str) -> str:
        if not all(map(math.isfinite, unpack_floats(data))):
            raise ValueError("an embedding holds finite numbers only")
        return data

    @property
    def vector(self) -> list[float]:
        """The numbers, as exactly as float32 has them."""
        return unpack_floats(self.data)


def pack_floats(numbers: Iterable[float]) -> str:
    """Return base64 over little-endian float32."""
    packed = array("f", numbers)
    if sys.byteorder == "big":
        packed.byteswap()
    return base64.b64encode(packed.tobytes()).decode()


def unpack_floats(data: str) -> list[float]:
    """Return the numbers that ``pack_floats`` packed.

    Raises:
        ValueError: It is something else.
    """
    packed = array("f")
    packed.frombytes(base64.b64decode(data, validate=True))
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tolist()


class Saves(_TaskEvent):
    """What a run of a program saved, as one safetensors file.

    ``step`` counts as in ``fabric.messages.program`` and is given with what is streamed; without
    it this is the rest, once the run has ended. The file is inline in base64 (``data``) or, above
    ``MAX_INLINE_BYTES``, a ``handle`` to where it is kept.
    """

    type: Literal["saves"] = "saves"
    run: Name
    step: int | None = Field(default=None, ge=0)
    names: tuple[Name, ...]
    size: int = Field(ge=0)
    data: str | None = Field(default=None, repr=False, max_length=-(-MAX_INLINE_BYTES // 3) * 4)
    handle: dict[str, object] | None = None


class Finished(_TaskEvent):
    """All choices are done."""

    type: Literal["finished"] = "finished"
    finish_reasons: tuple[FinishReason, ...]
    usage: Usage


class Failed(_TaskEvent):
    """The task ended without a result; ``usage`` says what it consumed until then."""

    type: Literal["failed"] = "failed"
    failure: Failure
    usage: Usage = Usage()


Event = Annotated[
    Accepted | PromptScored | Token | Embedding | Saves | Finished | Failed,
    Field(discriminator="type"),
]
