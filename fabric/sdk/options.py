"""What may be said about a request, and the body it becomes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict

Message = Mapping[str, object]
"""One turn of a conversation: ``{"role": "user", "content": "…"}``. ``Completion.message`` is the
assistant's, and ``{"role": "tool", "tool_call_id": …, "content": …}`` a call's result."""

Prompt = str | Sequence[Message]
"""Text to be continued, or a conversation to be answered."""


class Options(TypedDict, total=False):
    """Everything a request may carry besides its prompt; what is left out, the hub decides.

    Attributes:
        model: ``name`` or ``name@revision``; the one of the settings, or the hub's only one.
        max_tokens: The most tokens to generate.
        temperature: 0 is greedy, up to 2.
        top_p: Sample from the smallest set of tokens with this probability.
        top_k: Sample from so many of the most probable tokens; 0 for all.
        min_p: Drop tokens less probable than this part of the most probable one.
        presence_penalty: Taken from the logit of every token that the answer holds, -2 to 2.
        frequency_penalty: The same, once for each time that the answer holds it.
        repetition_penalty: Divides the logits of tokens of prompt and answer; 1 changes nothing.
        logit_bias: Added to logits, by token id, -100 to 100.
        json_schema: The answer is JSON that this schema accepts.
        regex: The whole answer matches this regular expression.
        choices: The answer is one of these texts.
        tools: Functions the model may call, in OpenAI's form (chat only).
        tool_choice: ``none``, ``auto``, ``required``, or the one that must be called, in OpenAI's
            form.
        parallel_tool_calls: Whether there may be more than one call.
        seed: Makes sampling repeatable.
        stop: Strings that end the output.
        n: How many choices.
        logprobs: Log probabilities of the tokens, with this many alternatives each.
        echo: Return the prompt too (completions only).
        data_site: The site where the request's data lives.
        data_bytes: The size of that data.
        sites: The only sites that may serve it.
        overflow: Whether it may leave instances of one's own, which keep it otherwise.
        deadline_s: Seconds from admission after which it is given up.
        policy: What the choice of a site should favour.
        weights: What a second of each part of the expected cost counts (queue, service, data,
            price, risk), in place of the policy's.
        tier: How urgent it is.
        adapter: The name of one of the project's adapters.
    """

    model: str | None
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    logit_bias: Mapping[int, float] | None
    json_schema: Mapping[str, object] | None
    regex: str | None
    choices: Sequence[str] | None
    tools: Sequence[Mapping[str, object]] | None
    tool_choice: str | Mapping[str, object] | None
    parallel_tool_calls: bool | None
    seed: int | None
    stop: str | Sequence[str] | None
    n: int | None
    logprobs: int | None
    echo: bool | None
    data_site: str | None
    data_bytes: int | None
    sites: Sequence[str] | None
    overflow: bool | None
    deadline_s: float | None
    policy: Literal["balanced", "fastest", "cheapest", "local-only"] | None
    weights: Mapping[str, float] | None
    tier: Literal["interactive", "standard", "batch"] | None
    adapter: str | None


_FABRIC_FIELDS = frozenset(
    {
        *("data_site", "data_bytes", "sites", "deadline_s", "policy", "weights", "tier"),
        *("json_schema", "regex", "choices", "adapter", "overflow"),
    }
)


def build_body(prompt: Prompt, options: Options) -> tuple[str, dict[str, object]]:
    """Return the path to post to and the body to post.

    Raises:
        TypeError: An option has an unknown name.
    """
    if unknown := sorted(set(options) - set(Options.__annotations__)):
        known = ", ".join(Options.__annotations__)
        raise TypeError(f"{unknown[0]!r} is not an option of a request; there are {known}")
    given = {name: value for name, value in options.items() if value is not None}
    body = {name: value for name, value in given.items() if name not in _FABRIC_FIELDS}
    if ours := {name: value for name, value in given.items() if name in _FABRIC_FIELDS}:
        body["fabric"] = ours
    if isinstance(prompt, str):
        return "/v1/completions", {"prompt": prompt, **body}
    if "logprobs" in body:
        body |= {"logprobs": True, "top_logprobs": body["logprobs"]}
    return "/v1/chat/completions", {"messages": [dict(turn) for turn in prompt], **body}


def as_conversation(messages: Prompt) -> Sequence[Message]:
    """Return a single question as the conversation it opens."""
    return [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
