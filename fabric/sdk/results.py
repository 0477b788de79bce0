"""What comes back: an answer, its pieces, and where it came from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of one request; ``prompt_tokens`` includes the cached ones."""

    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    completion_tokens: int = 0

    @classmethod
    def from_reply(cls, usage: Json) -> Usage:
        """Read OpenAI's ``usage`` object."""
        return cls(
            prompt_tokens=usage.get("prompt_tokens", 0),
            cached_prompt_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0),
            completion_tokens=usage.get("completion_tokens", 0),
        )

    def to_reply(self) -> dict[str, Any]:
        """Return OpenAI's ``usage`` object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_prompt_tokens},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call that the model asks for; ``arguments`` is JSON text."""

    id: str
    name: str
    arguments: str

    @classmethod
    def from_reply(cls, call: Json) -> ToolCall:
        """Read one entry of ``tool_calls``."""
        function = call["function"]
        return cls(id=call["id"], name=function["name"], arguments=function["arguments"])

    def to_reply(self) -> dict[str, Any]:
        """Return the call as messages have it."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}

    def read(self) -> dict[str, Any]:
        """Return the arguments.

        Raises:
            ValueError: They are no JSON: the answer was cut, or the model wrote them so.
        """
        arguments: dict[str, Any] = json.loads(self.arguments)
        return arguments


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One answer; ``logprobs`` is in OpenAI's form for the route it came from."""

    text: str
    finish_reason: str | None
    logprobs: Json | None = None
    tool_calls: tuple[ToolCall, ...] = ()

    @classmethod
    def from_reply(cls, choice: Json) -> Choice:
        """Read one entry of ``choices``, of a completion or of a chat completion."""
        message = choice.get("message")
        text = choice["text"] if message is None else message.get("content") or ""
        calls = (choice if message is None else message).get("tool_calls") or ()
        return cls(
            text=text,
            finish_reason=choice.get("finish_reason"),
            logprobs=choice.get("logprobs"),
            tool_calls=tuple(map(ToolCall.from_reply, calls)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A whole answer, and enough to get the same one again.

    Attributes:
        text: The first choice's text.
        site: Where it was computed.
        instance: The running copy of the model that computed it.
        digest: The digest of the model's tensors.
        attempts: How many instances were tried.
        reason: Why this site was chosen.
        charge_usu: What it cost, in micro-SU.
        first_token_s: Seconds from admission to the first token, if there was one.
        total_s: Seconds from admission to the end.
        run_id: Its name in the hub's records.
    """

    text: str
    choices: tuple[Choice, ...]
    model: str
    site: str
    instance: str
    digest: str
    attempts: int
    reason: str
    usage: Usage
    charge_usu: int
    first_token_s: float | None
    total_s: float
    run_id: str

    @classmethod
    def from_reply(cls, reply: Json) -> Completion:
        """Read the hub's reply to a completion or a chat completion."""
        ours = reply["fabric"]
        choices = tuple(Choice.from_reply(choice) for choice in reply["choices"])
        return cls(
            text=choices[0].text if choices else "",
            choices=choices,
            model=ours.get("model") or reply["model"],
            site=ours["site"],
            instance=ours["instance"],
            digest=ours["digest"],
            attempts=ours["attempts"],
            reason=ours["reason"],
            usage=Usage.from_reply(reply.get("usage") or {}),
            charge_usu=ours["charge_usu"],
            first_token_s=ours["first_token_s"],
            total_s=ours["total_s"],
            run_id=ours["run"],
        )

    def to_reply(self) -> dict[str, Any]:
        """Return the answer as JSON, in the form of a completion: ``from_reply`` reads it."""
        return {
            "object": "text_completion",
            "model": self.model,
            "choices": [
                {
                    "index": index,
                    "text": choice.text,
                    "finish_reason": choice.finish_reason,
                    "logprobs": choice.logprobs,
                    **_calls_of(choice),
                }
                for index, choice in enumerate(self.choices)
            ],
            "usage": self.usage.to_reply(),
            "fabric": {
                "run": self.run_id,
                "site": self.site,
                "instance": self.instance,
                "digest": self.digest,
                "model": self.model,
                "attempts": self.attempts,
                "charge_usu": self.charge_usu,
                "reason": self.reason,
                "first_token_s": self.first_token_s,
                "total_s": self.total_s,
            },
        }

    @property
    def finish_reason(self) -> str | None:
        """Why the first choice ended: ``stop``, ``length`` or ``tool_calls``."""
        return self.choices[0].finish_reason if self.choices else None

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The calls that the first choice asks for."""
        return self.choices[0].tool_calls if self.choices else ()

    @property
    def message(self) -> dict[str, Any]:
        """The answer as a turn to go on from in the next ``chat``."""
        calls = _calls_of(self.choices[0]) if self.choices else {}
        return {"role": "assistant", "content": self.text, **calls}

    @property
    def tokens_per_s(self) -> float | None:
        """The rate of generation after the first token; ``None`` when one token came, or none."""
        following = self.usage.completion_tokens - 1
        if self.first_token_s is None or following < 1 or self.total_s <= self.first_token_s:
            return None
        return following / (self.total_s - self.first_token_s)

    def _repr_html_(self) -> str:
        facts = [
            f"<b>{escape(self.site)}</b>",
            escape(self.reason),
            f"{self.usage.completion_tokens} tokens",
            f"{self.total_s:.2f} s",
            f"{self.charge_usu / 1e6:.6f} SU",
        ]
        if self.attempts > 1:
            facts.insert(2, f"{self.attempts} attempts")
        return (
            f'<div style="white-space:pre-wrap">{escape(self.text)}</div>'
            f'<div style="opacity:.65;font-size:85%">{" · ".join(facts)}</div>'
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A piece of a streamed answer.

    ``because`` is set on the first piece after the request moved to another instance, and says
    what ended the attempt before.
    """

    text: str
    choice: int = 0
    finish_reason: str | None = None
    logprobs: Json | None = None
    because: str | None = None


def _calls_of(choice: Choice) -> dict[str, Any]:
    calls = [call.to_reply() for call in choice.tool_calls]
    return {"tool_calls": calls} if calls else {}


def merge_calls(parts: Sequence[Json]) -> list[Json]:
    """Return the calls of a choice, put together from the pieces of its chunks."""
    calls: dict[int, Any] = {}
    for part in parts:
        function = part["function"]
        call = calls.setdefault(
            part["index"], {"id": "", "function": {"name": "", "arguments": ""}}
        )
        call["id"] += part.get("id") or ""
        call["function"]["name"] += function.get("name") or ""
        call["function"]["arguments"] += function.get("arguments") or ""
    return [call for _, call in sorted(calls.items())]


def merge_logprobs(parts: Sequence[Json]) -> Json | None:
    """Return the log probabilities of a choice's chunks as one object of the same form."""
    if not parts:
        return None
    keys = dict.fromkeys(key for part in parts for key in part)
    return {key: [item for part in parts for item in part.get(key) or ()] for key in keys}
