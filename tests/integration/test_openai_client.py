"""The official OpenAI client, unmodified, against a real hub."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from fabric.engine.interface import EventSink
from fabric.messages import Limits, RunState, Task
from fabric.testing.engine import FixedDelayEngine
from fabric.testing.hub import PROJECT, RunningHub, running_hub, wait_until

MESSAGES: Any = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Name a metal."},
]
SENTENCE = "word0 word1 word2 word3"


class RecordingEngine(FixedDelayEngine):
    """Keeps the tasks it was given."""

    tasks: list[Task]

    def submit(self, task: Task, sink: EventSink) -> None:
        self.__dict__.setdefault("tasks", []).append(task)
        super().submit(task, sink)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHub]:
    with running_hub(
        tmp_path_factory.mktemp("hub"), sites=["alpha"], engine=RecordingEngine
    ) as hub:
        yield hub


@pytest.fixture
def client(hub: RunningHub) -> Iterator[OpenAI]:
    with get_client(hub) as client:
        yield client


def get_client(hub: RunningHub, **options: Any) -> OpenAI:
    return OpenAI(
        base_url=hub.openai_url,
        **{"api_key": hub.api_key, "max_retries": 0, "timeout": 20} | options,
    )


# ---- models --------------------------------------------------------------------------------------


def test_models_are_listed_and_read(client: OpenAI) -> None:
    [model] = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("fixed", "model", "fabric")
    assert client.models.retrieve("fixed@1").id == "fixed@1"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("unheard-of")
    assert caught.value.code == "model_not_found"


# ---- completions ---------------------------------------------------------------------------------


def test_a_completion_is_answered_with_usage_and_where_it_ran(
    client: OpenAI, hub: RunningHub
) -> None:
    raw = client.completions.with_raw_response.create(
        model="fixed", prompt="one two three", max_tokens=4
    )
    reply = raw.parse()
    assert reply.object == "text_completion"
    assert reply.choices[0].text == SENTENCE
    assert reply.choices[0].finish_reason == "length"
    assert reply.choices[0].logprobs is None
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (3, 4)
    ours: Any = reply.fabric  # type: ignore[attr-defined]
    assert ours["site"] == raw.headers["x-fabric-site"] == "alpha"
    assert ours["run"] == raw.headers["x-request-id"]
    assert (ours["model"], ours["attempts"], ours["charge_usu"]) == ("fixed@1", 1, 3 + 2 * 4)
    assert ours["digest"] == hub.sites["alpha"].engine.info.digest == reply.system_fingerprint


def test_several_prompts_and_choices_are_indexed_by_prompt_then_choice(client: OpenAI) -> None:
    reply = client.completions.create(
        model="fixed", prompt=["a", "b c"], n=2, max_tokens=2, echo=True
    )
    assert [(c.index, c.text) for c in reply.choices] == [
        (0, "aword0 word1"),
        (1, "aword0 word1"),
        (2, "b cword0 word1"),
        (3, "b cword0 word1"),
    ]
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (1 + 2, 8)
    ours: Any = reply.fabric  # type: ignore[attr-defined]
    assert len({run["run"] for run in ours["runs"]}) == 2
    assert ours["charge_usu"] == 3 + 2 * 8


def test_sampling_fields_reach_the_engine(client: OpenAI, hub: RunningHub) -> None:
    client.completions.create(
        model="fixed", prompt="x", seed=5, stop=["\n", "END"], temperature=0.3, top_p=0.9
    )
    engine = hub.sites["alpha"].engine
    assert isinstance(engine, RecordingEngine)
    sampling = engine.tasks[-1].request.sampling
    assert (sampling.seed, sampling.stop) == (5, ("\n", "END"))
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (0.3, 0.9, 16)


def test_echo_with_logprobs_scores_the_prompt(client: OpenAI) -> None:
    """What lm-evaluation-harness asks: token ids, their scores, and one token more."""
    reply = client.completions.create(
        model="fixed", prompt=[5, 6, 7], echo=True, logprobs=2, max_tokens=1
    )
    scores = reply.choices[0].logprobs
    assert scores is not None
    assert scores.tokens is not None
    assert scores.token_logprobs == [None, -0.5, -0.5, -0.5]
    assert len(scores.tokens) == len(scores.top_logprobs or ()) == 4
    assert (scores.top_logprobs or [])[0] is None
    assert "".join(scores.tokens) == reply.choices[0].text
    offsets = scores.text_offset or []
    pieces = [reply.choices[0].text[offset:] for offset in offsets]
    assert all(rest.startswith(t) for rest, t in zip(pieces, scores.tokens, strict=True))


def test_echo_without_tokens_returns_the_prompt_alone(client: OpenAI) -> None:
    reply = client.completions.create(model="fixed", prompt="abc def", echo=True, max_tokens=0)
    assert reply.choices[0].text == "abc def"
    assert reply.choices[0].finish_reason == "length"


def test_a_stream_says_what_the_whole_reply_says(client: OpenAI) -> None:
    asked: Any = {
        "model": "fixed",
        "prompt": ["p q", "r"],
        "n": 2,
        "echo": True,
        "logprobs": 1,
        "max_tokens": 3,
    }
    whole = client.completions.create(**asked)
    texts = [""] * 4
    tokens: list[list[str]] = [[], [], [], []]
    offsets: list[list[int]] = [[], [], [], []]
    reasons: dict[int, str] = {}
    for chunk in client.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if choice.logprobs is not None:
                tokens[choice.index] += choice.logprobs.tokens or []
                offsets[choice.index] += choice.logprobs.text_offset or []
            if choice.finish_reason is not None:
                reasons[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert tokens == [choice.logprobs and choice.logprobs.tokens for choice in whole.choices]
    assert offsets == [choice.logprobs and choice.logprobs.text_offset for choice in whole.choices]
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}


# ---- chat ----------------------------------------------------------------------------------------


def test_a_chat_is_answered(client: OpenAI) -> None:
    reply = client.chat.completions.create(
        model="fixed", messages=MESSAGES, max_completion_tokens=4, n=2
    )
    assert reply.object == "chat.completion"
    assert [c.message.content for c in reply.choices] == [SENTENCE] * 2
    assert [c.index for c in reply.choices] == [0, 1]
    assert reply.choices[0].message.role == "assistant"
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 8


def test_chat_logprobs_carry_bytes_and_alternatives(client: OpenAI) -> None:
    reply = client.chat.completions.create(
        model="fixed", messages=MESSAGES, max_tokens=2, logprobs=True, top_logprobs=2
    )
    scores = reply.choices[0].logprobs
    assert scores is not None
    assert scores.content is not None
    assert [entry.token for entry in scores.content] == ["word0", " word1"]
    assert bytes(scores.content[1].bytes or []) == b" word1"
    assert [len(entry.top_logprobs) for entry in scores.content] == [2, 2]


def test_a_chat_streams_role_tokens_ending_and_usage(client: OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="fixed",
            messages=MESSAGES,
            max_tokens=4,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    first, *tokens, ending, usage = chunks
    assert first.choices[0].delta.role == "assistant"
    assert [chunk.choices[0].delta.content for chunk in tokens] == [
        "word0",
        " word1",
        " word2",
        " word3",
    ]
    assert ending.choices[0].finish_reason == "length"
    assert usage.choices == []
    assert usage.usage is not None
    assert usage.usage.completion_tokens == 4
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert first.fabric["site"] == "alpha"  # type: ignore[attr-defined]
    assert "charge_usu" not in first.fabric  # type: ignore[attr-defined]
    assert usage.fabric["charge_usu"] > 0  # type: ignore[attr-defined]
    assert len({chunk.id for chunk in chunks}) == 1


async def test_the_async_client_streams_several_chats_at_once(hub: RunningHub) -> None:
    async with AsyncOpenAI(base_url=hub.openai_url, api_key=hub.api_key) as client:

        async def text() -> str:
            stream = await client.chat.completions.create(
                model="fixed", messages=MESSAGES, max_tokens=4, stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        assert await asyncio.gather(*(text() for _ in range(8))) == [SENTENCE] * 8


# ---- errors --------------------------------------------------------------------------------------


def test_errors_have_the_types_and_codes_of_the_client(client: OpenAI, hub: RunningHub) -> None:
    with (
        get_client(hub, api_key="wrong") as stranger,
        pytest.raises(openai.AuthenticationError) as unauthenticated,
    ):
        stranger.models.list()
    assert unauthenticated.value.code == "invalid_api_key"
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="fixed", prompt="x", n=0)
    assert (bad.value.code, bad.value.param) == ("invalid_parameter", "n")
    assert bad.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="nope", prompt="x")
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    _, key = hub.keys.add_key(PROJECT, scopes=["admin"])
    with get_client(hub, api_key=key) as admin, pytest.raises(openai.PermissionDeniedError):
        admin.completions.create(model="fixed", prompt="x")


def test_what_the_instance_refuses_is_a_status_even_for_a_stream(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="fixed", prompt="w " * 3000, max_tokens=1, stream=True)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.request_id is not None
    assert caught.value.request_id.startswith("run_")


def test_no_balance_is_402_and_costs_nothing(hub: RunningHub) -> None:
    hub.keys.add_project("poor")
    hub.ledger.open_allocation("poor", "*")
    _, key = hub.keys.add_key("poor")
    with get_client(hub, api_key=key) as poor, pytest.raises(openai.APIStatusError) as caught:
        poor.completions.create(model="fixed", prompt="x")
    assert (caught.value.status_code, caught.value.code) == (402, "insufficient_balance")
    assert hub.ledger.statement("poor").lines == ()


# ---- faults --------------------------------------------------------------------------------------


def slow_engine() -> FixedDelayEngine:
    return FixedDelayEngine(
        token_s=0.02, limits=Limits(context_tokens=2048, max_rows=64, cache_tokens=2048 * 64)
    )


def test_tokens_arrive_one_by_one_and_not_in_bursts(tmp_path: Path) -> None:
    token_s = 0.1
    with (
        running_hub(
            tmp_path, sites=["alpha"], engine=lambda: FixedDelayEngine(token_s=token_s)
        ) as hub,
        get_client(hub) as client,
    ):
        stream = client.completions.create(model="fixed", prompt="x", max_tokens=20, stream=True)
        at = [time.monotonic() for chunk in stream if chunk.choices[0].text]
    assert len(at) == 20
    # A client that had to wait for its processor has missed some of the pauses, but not most.
    assert at[-1] - at[0] > 0.5 * 19 * token_s


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_row_and_pays_for_what_it_got(
    tmp_path: Path, stream: bool
) -> None:
    body = {"model": "fixed", "prompt": "x", "max_tokens": 1000, "stream": stream}
    with running_hub(tmp_path, sites=["alpha"], engine=slow_engine) as hub:
        engine = hub.sites["alpha"].engine
        with httpx.Client(headers={"authorization": f"Bearer {hub.api_key}"}) as client:
            url = f"{hub.openai_url}/completions"
            if stream:
                with client.stream("POST", url, json=body) as reply:
                    lines = (line for line in reply.iter_lines() if line)
                    next(lines), next(lines)
                    assert engine.load().num_running == 1
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post(url, json=body, timeout=0.2)
        wait_until(lambda: engine.load().num_running == 0)
        wait_until(lambda: [r.state for r in hub.catalog.runs(PROJECT)] == [RunState.CANCELLED])
        charges = [li for li in hub.ledger.statement(PROJECT).lines if li.kind == "charge"]
        assert len(charges) == 1
        assert 2 <= -charges[0].amount_usu < 2 * 200


def test_a_broken_stream_says_so_and_never_ends_in_done(tmp_path: Path) -> None:
    asked: Any = {"model": "fixed", "prompt": "x", "max_tokens": 500, "temperature": 1.0}
    with running_hub(tmp_path, engine=slow_engine) as hub:
        with get_client(hub) as client:
            stream = client.completions.create(**asked, stream=True)
            first = next(stream)
            hub.kill_site(first.fabric["site"])  # type: ignore[attr-defined]
            with pytest.raises(openai.APIError, match="cannot be continued exactly") as caught:
                list(stream)
            assert caught.value.code == "stream_broken"
        headers = {"authorization": f"Bearer {hub.api_key}"}
        url, body = f"{hub.openai_url}/completions", asked | {"stream": True}
        with httpx.stream("POST", url, json=body, headers=headers) as reply:
            lines = reply.iter_lines()
            [next(lines) for _ in range(5)]
            hub.kill_site(reply.headers["x-fabric-site"])
            rest = [line for line in lines if line]
        assert "[DONE]" not in "".join(rest)
        assert '"code": "stream_broken"' in rest[-1]
        assert '"charge_usu"' in rest[-1]


def test_a_seeded_stream_goes_on_elsewhere_and_says_why(tmp_path: Path) -> None:
    with running_hub(tmp_path, engine=slow_engine) as hub, get_client(hub) as client:
        stream = client.chat.completions.create(
            model="fixed", messages=MESSAGES, max_tokens=20, seed=1, stream=True
        )
        first = next(stream)
        lost = first.fabric["site"]  # type: ignore[attr-defined]
        hub.kill_site(lost)
        chunks = [first, *stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text.split() == [f"word{i}" for i in range(20)]
    news: list[Any] = [c.fabric for c in chunks if getattr(c, "fabric", None)]  # type: ignore[attr-defined]
    moved = [ours for ours in news if "because" in ours]
    assert len(moved) == 1
    assert moved[0]["attempts"] == 2
    assert moved[0]["site"] != lost
    assert news[-1]["attempts"] == 2
    assert news[-1]["site"] == moved[0]["site"]
