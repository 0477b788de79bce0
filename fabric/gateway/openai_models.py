"""What clients of the OpenAI API send.

Types are strict, unknown fields are refused by name, and what cannot be honoured is accepted only
at the value that asks for nothing. Bounds are those of ``fabric.messages``, where the fields end
up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from fabric.errors import RequestInvalid
from fabric.gateway.fabric_options import FabricOptions, PlacementOptions
from fabric.gateway.openai_fields import Body, Content, InputTexts, Prompts, Stop, neutral
from fabric.gateway.refusals import refusal_of
from fabric.gateway.response_format import ResponseFormat
from fabric.gateway.tools import (
    CalledTool,
    ToolDefinition,
    ToolSelection,
    constraint_of,
    read_choice,
)
from fabric.messages import (
    EMBED_SAMPLING,
    ChatInput,
    ChatMessage,
    Constraint,
    ModelRef,
    Pooling,
    Request,
    Sampling,
    TextInput,
    TokensInput,
    ToolChoice,
)

DEFAULT_COMPLETION_TOKENS = 16
"""What the OpenAI API generates for a completion that does not say ``max_tokens``."""

_SAMPLING = (
    *("n", "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "ignore_eos"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias"),
)
"""The parameters that have the names of ``Sampling``'s fields."""


class StreamOptions(Body):
    """What a stream carries besides its choices."""

    include_usage: bool | None = None
    include_obfuscation: Annotated[object, neutral(False)] = None


class Generation(Body):
    """The fields that completions and chat completions share."""

    model: ModelRef
    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: Stop = None
    ignore_eos: bool | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    fabric: FabricOptions | None = None

    @model_validator(mode="after")
    def _usage_of_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError(
                "param", "it is for streams only; send stream: true", {"param": "stream_options"}
            )
        return self

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a chunk of usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def _sampling(
        self, special: Mapping[str, object], rename: Mapping[str, str] | None = None
    ) -> Sampling:
        given = {name: value for name in _SAMPLING if (value := getattr(self, name)) is not None}
        constraints = self._constraints()
        if len(constraints) > 1:
            first, second, *_ = constraints
            raise RequestInvalid(
                param=second, value="given", reason=f"{first} says already what the answer must be"
            )
        given["constraint"] = next(iter(constraints.values()), None)
        try:
            return Sampling.model_validate({**given, **special})
        except ValidationError as error:
            raise refusal_of(error, rename=rename) from None

    def _constraints(self) -> dict[str, Constraint]:
        """Return what the answer must be, by each parameter that says so."""
        return self.fabric.to_constraints() if self.fabric else {}

    def _request(self, input: TextInput | TokensInput | ChatInput, sampling: Sampling) -> Request:
        options = self.fabric.to_fields() if self.fabric else {}
        try:
            return Request(
                model=self.model,
                input=input,
                sampling=sampling,
                stream=bool(self.stream),
                **options,
            )
        except ValidationError as error:
            raise refusal_of(error, within="fabric") from None


class CompletionBody(Generation):
    """``POST /v1/completions``."""

    prompt: Prompts
    echo: bool | None = None
    logprobs: int | None = None
    best_of: Annotated[object, neutral(1)] = None
    suffix: Annotated[object, neutral("")] = None

    def requests(self) -> Iterator[Request]:
        """Yield one request a prompt.

        Raises:
            RequestInvalid: A parameter is out of its bounds.
        """
        for prompt in self.prompt:
            # Only the instance has the tokenizer: it says what token ids to be echoed read as.
            scored = self.logprobs is not None or isinstance(prompt, TokensInput)
            special: dict[str, object] = {
                "logprobs": self.logprobs,
                "prompt_logprobs": bool(self.echo) and scored,
            }
            if self.max_tokens is None:
                special["max_tokens"] = DEFAULT_COMPLETION_TOKENS
            yield self._request(prompt, self._sampling(special))


class ChatTurn(Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    tool_calls: tuple[CalledTool, ...] | None = None
    tool_call_id: str | None = None
    name: Annotated[object, neutral()] = None
    refusal: Annotated[object, neutral()] = None
    audio: Annotated[object, neutral()] = None
    annotations: Annotated[object, neutral([])] = None
    function_call: Annotated[object, neutral()] = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        wrong = {
            "content": (self.content is None and not self.tool_calls, "it is required"),
            "tool_calls": (
                bool(self.tool_calls) and self.role != "assistant",
                "only messages of the assistant have them",
            ),
            "tool_call_id": (
                (self.role == "tool") != (self.tool_call_id is not None),
                'messages of the role "tool" have it, and no others',
            ),
        }
        for param, (is_wrong, reason) in wrong.items():
            if is_wrong:
                raise PydanticCustomError("param", reason, {"param": param})
        return self

    def to_message(self) -> ChatMessage:
        """Return the turn as the instance takes it; a developer speaks as the system.

        Raises:
            RequestInvalid: It holds too many calls.
        """
        try:
            return ChatMessage(
                role="system" if self.role == "developer" else self.role,
                content=self.content or "",
                tool_calls=tuple(call.to_call() for call in self.tool_calls or ()),
                tool_call_id=self.tool_call_id,
            )
        except ValidationError as error:
            raise refusal_of(error, within="messages") from None


class ChatBody(Generation):
    """``POST /v1/chat/completions``."""

    messages: tuple[ChatTurn, ...]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    tools: tuple[ToolDefinition, ...] | None = None
    tool_choice: ToolSelection | None = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[object, neutral([])] = None
    function_call: Annotated[object, neutral("none", "auto")] = None
    modalities: Annotated[object, neutral(["text"])] = None
    store: Annotated[object, neutral(False)] = None
    metadata: Annotated[object, neutral({})] = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.messages:
            raise PydanticCustomError(
                "param", "it should hold at least one message", {"param": "messages"}
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("param", "it needs logprobs: true", {"param": "top_logprobs"})
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise PydanticCustomError(
                "param",
                "it is the newer name of max_tokens; send only one of the two",
                {"param": "max_completion_tokens"},
            )
        return self

    def _constraints(self) -> dict[str, Constraint]:
        constraint = self.response_format.to_constraint() if self.response_format else None
        choice = self._tool_choice()
        calls = constraint_of(choice) if choice else None
        given = {"tool_choice": calls, "response_format": constraint}
        own = {param: constraint for param, constraint in given.items() if constraint is not None}
        return {**own, **super()._constraints()}

    def _tool_choice(self) -> ToolChoice | None:
        parallel = self.parallel_tool_calls is not False
        return read_choice(self.tools or (), self.tool_choice, parallel=parallel)

    def to_request(self) -> Request:
        """Return the request.

        Raises:
            RequestInvalid: A parameter is out of its bounds.
        """
        special: dict[str, object] = {}
        rename = {"logprobs": "top_logprobs"}
        if self.logprobs:
            special["logprobs"] = self.top_logprobs or 0
        if self.max_completion_tokens is not None:
            special["max_tokens"] = self.max_completion_tokens
            rename["max_tokens"] = "max_completion_tokens"
        chat = ChatInput(
            messages=tuple(turn.to_message() for turn in self.messages),
            tool_choice=self._tool_choice(),
        )
        return self._request(chat, self._sampling(special, rename))


class EmbeddingOptions(PlacementOptions):
    """Ours, of a request for embeddings."""

    pooling: Pooling | None = None


class EmbeddingBody(Body):
    """``POST /v1/embeddings``."""

    model: ModelRef
    input: InputTexts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    user: str | None = None
    fabric: EmbeddingOptions | None = None

    def requests(self) -> Iterator[Request]:
        """Yield one request a text.

        Raises:
            RequestInvalid: A parameter is out of its bounds.
        """
        options = {} if self.fabric is None else self.fabric.to_fields()
        for text in self.input:
            try:
                yield Request(
                    mode="embed",
                    model=self.model,
                    input=text,
                    sampling=EMBED_SAMPLING,
                    dimensions=self.dimensions,
                    **options,
                )
            except ValidationError as error:
                raise refusal_of(error, within="fabric") from None
