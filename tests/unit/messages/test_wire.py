"""Frames survive the wire unchanged, and what does not belong there is refused by name."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fabric.errors import ContextExceeded, FabricError, InsufficientBalance, ProtocolViolation
from fabric.messages import (
    ChatInput,
    ChatMessage,
    Choices,
    Constraint,
    Embedding,
    Failure,
    InstanceState,
    JsonSchema,
    Regex,
    Request,
    RunState,
    Sampling,
    Task,
    TextInput,
    Token,
    pack_floats,
    parse_from_hub,
    parse_from_instance,
)
from fabric.messages.events import MAX_DIMENSIONS

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=50)


@given(text=text, position=st.integers(0, 10**6), logprob=st.none() | st.floats(-50, 0))
def test_token_frame_round_trips(text: str, position: int, logprob: float | None) -> None:
    token = Token(
        task_id="run_1",
        attempt=1,
        choice=0,
        position=position,
        token_id=3,
        text=text,
        logprob=logprob,
    )
    assert parse_from_instance(token.model_dump_json()) == token


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_embedding_frame_carries_exactly_float32(numbers: list[float]) -> None:
    event = Embedding(task_id="run_1", attempt=1, data=pack_floats(numbers))
    again = parse_from_instance(event.model_dump_json())
    assert again == event
    assert isinstance(again, Embedding)
    assert again.vector == numbers


@pytest.mark.parametrize(
    "data",
    [
        *("", "AAA", "AAAA", "no base64!"),
        pack_floats([float("nan")]),
        pack_floats([float("inf")]),
        pack_floats([0.0] * (MAX_DIMENSIONS + 2)),
    ],
)
def test_an_embedding_that_is_no_vector_is_refused(data: str) -> None:
    frame = {"type": "embedding", "task_id": "run_1", "attempt": 1, "data": data}
    with pytest.raises(ProtocolViolation):
        parse_from_instance(json.dumps(frame))


@pytest.mark.parametrize(
    "changes",
    [
        {"pooling": "last"},
        {"dimensions": 3},
        {"mode": "embed"},
        {"mode": "embed", "sampling": {"max_tokens": 0, "n": 2}},
        {"mode": "embed", "sampling": {"max_tokens": 0, "prompt_logprobs": True}},
        {
            "mode": "embed",
            "sampling": {"max_tokens": 0},
            "input": {"kind": "chat", "messages": [{"role": "user", "content": "x"}]},
        },
    ],
)
def test_a_request_generates_or_embeds_and_never_half_of_each(changes: dict) -> None:
    body = {"model": "m", "input": {"kind": "text", "text": "x"}, **changes}
    with pytest.raises(ValidationError, match="embed"):
        Request.model_validate(body)


@given(prompt=text, seed=st.none() | st.integers(-(2**63), 2**63 - 1))
def test_task_frame_round_trips(prompt: str, seed: int | None) -> None:
    request = Request(model="m@1", input=TextInput(text=prompt), sampling=Sampling(seed=seed))
    task = Task(id=request.id, attempt=2, request=request, digest="d", prefix=(1, 2), deadline_s=3)
    assert parse_from_hub(task.model_dump_json()) == task


@pytest.mark.parametrize(
    "constraint",
    [JsonSchema(definition='{"type": "object"}'), Regex(pattern="é+"), Choices(texts=("a", "b"))],
)
def test_what_an_answer_must_be_round_trips(constraint: Constraint) -> None:
    sampling = Sampling(constraint=constraint, logit_bias={7: -1.5}, presence_penalty=0.5)
    request = Request(model="m@1", input=TextInput(text="x"), sampling=sampling)
    task = Task(id=request.id, attempt=1, request=request, digest="d", deadline_s=3)
    assert parse_from_hub(task.model_dump_json()) == task


@pytest.mark.parametrize(
    "frame",
    [
        "",
        "null",
        "[]",
        '{"type": "token"}',
        '{"type": "welcome", "session": "s", "heartbeat_s": 0}',
        '{"type": "hello", "surprise": 1}',
        '{"type": "token", "task_id": "r", "attempt": 1, "choice": 0, "position": 0, "token_id": 1,'
        ' "text": "", "logprob": NaN}',
        b"\xff\xfe",
    ],
)
def test_frame_outside_the_protocol_is_refused(frame: str | bytes) -> None:
    with pytest.raises(ProtocolViolation):
        parse_from_instance(frame)


def test_error_comes_back_in_its_own_class_with_its_fields() -> None:
    error = ContextExceeded(prompt_tokens=9000, max_tokens=1, context_tokens=8192)
    wire = Failure.model_validate_json(Failure.of(error).model_dump_json())
    again = wire.to_error()
    assert type(again) is ContextExceeded
    assert again.message == error.message
    assert again.detail["prompt_tokens"] == 9000


def test_error_of_an_unknown_code_stays_readable() -> None:
    again = Failure(code="from_the_future", message="What happened.").to_error()
    assert type(again) is FabricError
    assert again.message == "What happened."


def test_every_error_class_has_a_code_of_its_own() -> None:
    def descendants(cls: type[FabricError]) -> list[type[FabricError]]:
        return [cls, *(d for sub in cls.__subclasses__() for d in descendants(sub))]

    classes = descendants(FabricError)
    assert len({cls.code for cls in classes}) == len(classes)


def test_message_says_value_and_remedy() -> None:
    error = InsufficientBalance(account="allocation:p:*", needed_usu=10, available_usu=3)
    assert "3 micro-SU" in error.message
    assert "10" in error.message
    assert "fabric usage" in error.message


@given(prompt=text)
def test_prompt_bound_covers_a_token_a_byte(prompt: str) -> None:
    plain = Request(model="m", input=TextInput(text=prompt))
    chat = Request(model="m", input=ChatInput(messages=(ChatMessage(role="user", content=prompt),)))
    assert plain.prompt_tokens_bound() >= len(prompt.encode())
    assert chat.prompt_tokens_bound() > plain.prompt_tokens_bound()


def test_final_states_are_final() -> None:
    assert {s for s in RunState if s.final} == {
        RunState.COMPLETED,
        RunState.FAILED,
        RunState.CANCELLED,
    }
    assert not InstanceState.LOST.final
