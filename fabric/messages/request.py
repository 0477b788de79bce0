"""What a user asks of the fabric."""

from __future__ import annotations

import json
import secrets
from functools import cached_property
from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from fabric.messages.constraint import Constraint
from fabric.messages.program import Program, ProgramRun
from fabric.messages.tools import MAX_TOOL_CALLS, ToolCall, ToolChoice
from fabric.messages.wire import Wire

MAX_CHOICES = 16
MAX_STOPS = 16
MAX_LOGPROBS = 20
MAX_BIASES = 1024

MODEL_NAME = r"[A-Za-z0-9_./-]{1,128}"
MODEL_VERSION = r"[A-Za-z0-9_.:-]{1,128}"
SITE_NAME = r"[a-z0-9][a-z0-9-]{0,62}"

ModelRef = Annotated[str, StringConstraints(pattern=f"^{MODEL_NAME}(@{MODEL_VERSION})?$")]
"""``name`` or ``name@revision``; a revision is a name or a digest."""

CostPart = Literal["queue", "service", "data", "price", "risk"]
"""A part of the expected cost of a choice, in seconds."""

Weights = dict[CostPart, Annotated[float, Field(ge=0.0, le=100.0)]]
"""What a second of each part counts."""

Mode = Literal["query", "embed", "program"]
"""What is asked of a model: to generate, to turn the prompt into one vector, or to run a program
inside its forward passes."""

Pooling = Literal["mean", "last"]
"""Which hidden states of the prompt's tokens make its vector: their mean, or the last one."""

SiteName = Annotated[str, StringConstraints(pattern=f"^{SITE_NAME}$")]

AdapterName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$")]
"""What a project calls one of its adapters."""

AdapterDigest = Annotated[str, StringConstraints(pattern=r"^blake3:[0-9a-f]{64}$")]
"""Of an adapter's one file; see ``fabric.payloads.lora``."""


def new_id(kind: str) -> str:
    """Return a fresh identifier such as ``run_3f0c…``: ``kind``, then 32 hexadecimal digits."""
    return f"{kind}_{secrets.token_hex(16)}"


class TextInput(Wire):
    """A prompt as text; the instance tokenizes it."""

    kind: Literal["text"] = "text"
    text: str

    @cached_property
    def tokens_bound(self) -> int:
        """See ``Request.prompt_tokens_bound``, which is asked for every replica."""
        return len(self.text.encode()) + 1


class TokensInput(Wire):
    """A prompt as token ids of the model's own vocabulary."""

    kind: Literal["tokens"] = "tokens"
    ids: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)

    @property
    def tokens_bound(self) -> int:
        """How many there are."""
        return len(self.ids)


class ChatMessage(Wire):
    """One turn of a conversation: the assistant's may hold calls, and a ``tool``'s is the result of
    the call ``tool_call_id``."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    tool_calls: tuple[ToolCall, ...] = Field(default=(), max_length=MAX_TOOL_CALLS)
    tool_call_id: str | None = Field(default=None, max_length=64)


class ChatInput(Wire):
    """A conversation; the instance renders it with the model's chat template."""

    kind: Literal["chat"] = "chat"
    messages: tuple[ChatMessage, ...] = Field(min_length=1)
    tool_choice: ToolChoice | None = None

    @cached_property
    def tokens_bound(self) -> int:
        """See ``Request.prompt_tokens_bound``."""
        return 256 + _num_tool_bytes(self.tool_choice) + sum(map(_num_turn_bytes, self.messages))


class ProgramInput(Wire):
    """An intervention program, whose runs have the prompts."""

    kind: Literal["program"] = "program"
    program: Program

    @cached_property
    def tokens_bound(self) -> int:
        """Of the prompts of all runs."""
        return sum(map(_num_prompt_tokens, self.program.runs))


class Sampling(Wire):
    """How tokens are chosen.

    ``temperature`` 0 is greedy. ``logprobs`` counts alternatives per token (0: the chosen token
    only; ``None``: none at all). ``prompt_logprobs`` scores the prompt's own tokens too.
    ``ignore_eos`` generates on past the end-of-sequence token, to ``max_tokens``.
    ``min_p`` drops tokens less probable than this part of the most probable one.
    ``presence_penalty`` and ``frequency_penalty`` count the tokens of the answer,
    ``repetition_penalty`` (1: none) those of the prompt too; ``logit_bias`` is added by token id.
    ``constraint`` says what the answer must be.
    """

    max_tokens: int | None = Field(default=None, ge=0)
    temperature: float = Field(default=1.0, ge=0.0, le=2.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=0)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: tuple[Annotated[str, Field(min_length=1, max_length=256)], ...] = Field(
        default=(), max_length=MAX_STOPS
    )
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    prompt_logprobs: bool = False
    ignore_eos: bool = False
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    presence_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    frequency_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100.0)
    logit_bias: dict[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=-100.0, le=100.0)]] = (
        Field(default={}, max_length=MAX_BIASES)
    )
    constraint: Annotated[Constraint, Field(discriminator="kind")] | None = None

    @model_validator(mode="after")
    def _ends_where_its_constraint_does(self) -> Self:
        if self.constraint is not None and self.ignore_eos:
            raise PydanticCustomError(
                "param",
                "an answer with a constraint ends where that says; leave it out",
                {"param": "ignore_eos"},
            )
        return self

    @property
    def reproducible(self) -> bool:
        """Whether the same request yields the same tokens again: greedy, or sampled with a seed."""
        return self.temperature == 0.0 or self.seed is not None


EMBED_SAMPLING = Sampling(max_tokens=0)
"""Of every request of mode ``embed``, where nothing is generated, and of mode ``program``, whose
runs say for themselves how they go on."""


class Request(Wire):
    """One request, as the broker admits it.

    ``deadline_s`` counts seconds from admission. ``data_site`` names the site where the request's
    data lives and ``data_bytes`` its size: the broker weighs moving it. ``sites`` restricts where
    it may run; ``overflow`` lets it leave instances of the caller's own that would otherwise keep
    it. ``weights`` replace those of the ``policy``, part by part. The mode ``embed`` takes
    no sampling but ``max_tokens`` 0, and no conversation; ``pooling`` (``None``: as the model was
    made, or the mean) and ``dimensions``, which the vector must have, are for it alone. ``adapter``
    names one of the project's own, made for this version of the model.
    """

    id: str = Field(default_factory=lambda: new_id("run"))
    mode: Mode = "query"
    model: ModelRef
    input: Annotated[
        TextInput | TokensInput | ChatInput | ProgramInput, Field(discriminator="kind")
    ]
    sampling: Sampling = Sampling()
    pooling: Pooling | None = None
    dimensions: int | None = Field(default=None, ge=1)
    tier: Literal["interactive", "standard", "batch"] = "standard"
    policy: Literal["balanced", "fastest", "cheapest", "local-only"] = "balanced"
    weights: Weights | None = None
    stream: bool = False
    deadline_s: float = Field(default=300.0, gt=0.0, le=86_400.0)
    data_site: SiteName | None = None
    data_bytes: int = Field(default=0, ge=0)
    sites: tuple[SiteName, ...] | None = None
    overflow: bool = False
    adapter: AdapterName | None = None

    @model_validator(mode="after")
    def _data_has_a_home(self) -> Request:
        if self.policy == "local-only" and self.data_site is None:
            raise ValueError("policy 'local-only' needs data_site, the site the data may not leave")
        return self

    @model_validator(mode="after")
    def _embeds_or_generates(self) -> Request:
        if self.mode != "embed" and (self.pooling, self.dimensions) != (None, None):
            raise ValueError("pooling and dimensions are for the mode 'embed' alone")
        if self.mode == "embed" and isinstance(self.input, ChatInput):
            raise ValueError("a conversation cannot be embedded; send its text")
        if self.mode == "embed" and self.sampling != EMBED_SAMPLING:
            raise ValueError("the mode 'embed' takes no sampling but max_tokens 0")
        return self

    @model_validator(mode="after")
    def _is_a_program_or_not(self) -> Request:
        if (self.mode == "program") != isinstance(self.input, ProgramInput):
            raise ValueError("the mode 'program' and the input kind 'program' go together")
        if self.mode == "program" and self.sampling != EMBED_SAMPLING:
            raise ValueError("the mode 'program' takes no sampling: its runs say how they go on")
        if self.mode == "program" and self.adapter is not None:
            raise ValueError("a program takes no adapter; give its runs overlays")
        return self

    def prompt_tokens_bound(self) -> int:
        """Return an upper bound of the prompt's tokens without a tokenizer.

        A byte-level vocabulary never makes more tokens than UTF-8 bytes; a chat template adds a
        few special tokens a turn (32 allows for every template in use) and may add a default
        system prompt (256). Tools come as JSON, indented at most, after instructions of at most
        2,048 bytes. Encoders put a token before a text and one after it.
        """
        ends = self.mode == "embed" and isinstance(self.input, TextInput)
        return self.input.tokens_bound + ends


def _num_turn_bytes(turn: ChatMessage) -> int:
    calls = sum(128 + _num_json_bytes(json.loads(call.arguments)) for call in turn.tool_calls)
    return 32 + len(turn.content.encode()) + calls


def _num_tool_bytes(choice: ToolChoice | None) -> int:
    if choice is None:
        return 0
    return 2048 + sum(
        256 + _num_json_bytes([tool.name, tool.description, json.loads(tool.parameters)])
        for tool in choice.tools
    )


def _num_json_bytes(value: object) -> int:
    # Templates indent it by at most four, and two levels deep.
    return len(json.dumps([[value]], indent=4).encode())


def _num_prompt_tokens(run: ProgramRun) -> int:
    return len(run.ids or ()) if run.text is None else len(run.text.encode()) + 1
