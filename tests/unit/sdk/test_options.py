"""Options become the body that the gateway reads."""

from __future__ import annotations

import json

from fabric.gateway.openai_models import ChatBody, CompletionBody
from fabric.messages import Choices, JsonSchema
from fabric.sdk.options import build_body


def test_constraints_and_penalties_reach_the_request() -> None:
    path, body = build_body(
        "p", {"model": "m", "choices": ["a", "b"], "min_p": 0.1, "logit_bias": {7: -1.0}}
    )
    assert path == "/v1/completions"
    (request,) = CompletionBody.model_validate_json(json.dumps(body)).requests()
    assert request.sampling.constraint == Choices(texts=("a", "b"))
    assert (request.sampling.min_p, request.sampling.logit_bias) == (0.1, {7: -1.0})


def test_a_conversation_takes_a_schema() -> None:
    question = [{"role": "user", "content": "q"}]
    _, body = build_body(question, {"model": "m", "json_schema": {"type": "null"}})
    request = ChatBody.model_validate_json(json.dumps(body)).to_request()
    assert request.sampling.constraint == JsonSchema(definition='{"type": "null"}')
