"""What every engine keeps: one suite over the fake, ours, and vLLM's protocol.

``FABRIC_VLLM`` names the command of a real vLLM, which then runs the same suite.
"""

from __future__ import annotations

import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fabric.engine.config import EngineConfig
from fabric.engine.embedding import EmbeddingEngine
from fabric.engine.interface import Engine
from fabric.engine.source import ModelSource
from fabric.engine.torch_engine import TorchEngine
from fabric.engine.vllm.engine import VllmEngine
from fabric.errors import DigestMismatch
from fabric.messages import (
    Accepted,
    ChatInput,
    ChatMessage,
    JsonSchema,
    PromptScored,
    Regex,
    TextInput,
    VllmOptions,
)
from fabric.testing.asking import PROMPT, Asker
from fabric.testing.engine import FixedDelayEngine
from fabric.testing.hub import wait_until
from fabric.testing.tiny_model import save_tiny_llama, save_tiny_sentences

pytestmark = pytest.mark.timeout(300)

REAL = os.environ.get("FABRIC_VLLM", "")
STAND_IN = (sys.executable, "-m", "fabric.testing.vllm_server")
KINDS = ["fixed", "torch", "vllm"]
COMPUTING = KINDS[1:]
SIZES = EngineConfig(
    dtype="float32", num_threads=1, cache_bytes=4 * 2**20, max_rows=8, step_tokens=64
)
EMBEDDING = ["fixed", "torch", "sentences", "vllm pooling", "vllm sentences"]


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # vLLM's attention on CPUs takes heads of 32 and more.
    path = tmp_path_factory.mktemp("models") / "tiny"
    return save_tiny_llama(path, num_attention_heads=2, num_key_value_heads=1)


def get_vllm(path: Path, **changes: Any) -> VllmEngine:
    command = tuple(shlex.split(REAL)) or STAND_IN
    args = ("--enforce-eager",) if REAL else ()
    options = VllmOptions(**{"command": command, "args": args, "start_s": 240.0} | changes)
    return VllmEngine(ModelSource.parse(str(path)), SIZES, options, name="tiny")


@pytest.fixture(scope="module")
def sentence_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_sentences(tmp_path_factory.mktemp("models") / "sentences", hidden_size=64)


@pytest.fixture(scope="module")
def make(tiny_dir: Path, sentence_dir: Path) -> Iterator[Callable[[str], Engine]]:
    """Start an engine of each kind once."""
    engines: dict[str, Engine] = {}

    def start(kind: str) -> Engine:
        if kind not in engines:
            source = ModelSource.parse(str(tiny_dir))
            engine: Engine = {
                "fixed": lambda: FixedDelayEngine(token_s=0.002, stop_after=200),
                "torch": lambda: TorchEngine(source, SIZES, name="tiny"),
                "sentences": lambda: EmbeddingEngine(
                    ModelSource.parse(str(sentence_dir)), SIZES, name="tiny"
                ),
                "vllm": lambda: get_vllm(tiny_dir),
                "vllm pooling": lambda: get_vllm(tiny_dir, runner="pooling"),
                "vllm sentences": lambda: get_vllm(sentence_dir),
            }[kind]()
            engine.start()
            engines[kind] = engine
        return engines[kind]

    yield start
    for engine in engines.values():
        engine.close()


@pytest.fixture(params=KINDS)
def any_engine(request: pytest.FixtureRequest, make: Callable[[str], Engine]) -> Asker:
    """An engine of each kind."""
    return Asker(make(request.param))


@pytest.fixture(params=COMPUTING)
def computing(request: pytest.FixtureRequest, make: Callable[[str], Engine]) -> Asker:
    """An engine of each kind that has a model."""
    return Asker(make(request.param))


@pytest.fixture(params=EMBEDDING)
def embedding(request: pytest.FixtureRequest, make: Callable[[str], Engine]) -> Asker:
    """An engine of each kind that embeds."""
    return Asker(make(request.param))


@pytest.fixture
def vllm(make: Callable[[str], Engine]) -> Asker:
    """The backend."""
    return Asker(make("vllm"))


@pytest.fixture
def ours(make: Callable[[str], Engine]) -> Asker:
    """Our engine over the same files."""
    return Asker(make("torch"))


# ---- every engine --------------------------------------------------------------------------------


def test_a_task_is_accepted_then_told_token_by_token_then_finished(any_engine: Asker) -> None:
    heard = any_engine.ask(max_tokens=6)
    finished = heard.finished
    first, *tokens, _ = heard.events
    assert isinstance(first, Accepted)
    assert first.prompt_tokens == len(PROMPT) == finished.usage.prompt_tokens
    assert [token.position for token in heard.tokens()] == list(range(6))
    assert len(tokens) == 6 == finished.usage.output_tokens
    assert [token.finish_reason for token in heard.tokens()] == [None] * 5 + ["length"]
    assert finished.finish_reasons == ("length",)


def test_choices_are_told_apart(any_engine: Asker) -> None:
    heard = any_engine.ask(n=3, max_tokens=4)
    assert heard.finished.finish_reasons == ("length",) * 3
    assert heard.ids(0) == heard.ids(1) == heard.ids(2)
    assert heard.finished.usage.output_tokens == 12


def test_sampled_choices_differ(computing: Asker) -> None:
    heard = computing.ask(n=3, max_tokens=12, temperature=1.5, seed=3)
    assert heard.finished
    assert len({tuple(heard.ids(choice)) for choice in range(3)}) > 1


def test_many_tasks_at_once_end_each_with_their_own_tokens(any_engine: Asker) -> None:
    asked = [any_engine.ask(PROMPT[: 1 + i % 4], max_tokens=3 + i) for i in range(12)]
    for i, heard in enumerate(asked):
        assert heard.finished.usage.output_tokens == len(heard.ids()) == 3 + i
    again = any_engine.ask(PROMPT[:1], max_tokens=3)
    assert again.finished
    assert again.ids() == asked[0].ids()


def test_what_is_over_the_context_is_refused(any_engine: Asker) -> None:
    context_tokens = any_engine.engine.info.limits.context_tokens
    assert any_engine.ask([1] * context_tokens).failure_code == "context_length_exceeded"


def test_a_cancelled_task_ends_with_what_it_has_used(any_engine: Asker) -> None:
    heard = any_engine.ask(max_tokens=200)
    assert heard.begun.wait(60)
    assert any_engine.last_task is not None
    any_engine.engine.cancel(any_engine.last_task.id, 1)
    assert heard.failure_code == "request_cancelled"
    assert heard.last.usage.output_tokens >= 1
    any_engine.engine.cancel("unknown", 1)
    assert any_engine.ask(max_tokens=1).finished


def test_a_deadline_that_passes_ends_the_task(any_engine: Asker) -> None:
    assert any_engine.ask(max_tokens=200, deadline_s=0.002).failure_code == "deadline_exceeded"


def test_an_idle_engine_says_so(any_engine: Asker) -> None:
    assert any_engine.ask(max_tokens=2).finished

    def idle() -> bool:
        load = any_engine.engine.load()
        return (load.num_running, load.num_waiting) == (0, 0)

    wait_until(idle)  # the load is told after the step that the answer came from


# ---- engines with a model ------------------------------------------------------------------------


def test_another_versions_task_is_refused(computing: Asker) -> None:
    assert computing.ask(digest="blake3:0").failure_code == "digest_mismatch"


@pytest.mark.parametrize("prompt", [[9999], "", "\ud800"])
def test_bad_prompts_are_the_callers_error(computing: Asker, prompt: Any) -> None:
    if prompt == "\ud800":
        prompt = TextInput.model_construct(kind="text", text=prompt)
    assert computing.ask(prompt).failure_code == "invalid_parameter"


def test_a_conversation_is_rendered_by_the_models_template(computing: Asker) -> None:
    chat = ChatInput(messages=(ChatMessage(role="user", content="hi"),))
    text = "<start>user:hi<end><start>assistant:"
    heard, plain = computing.ask(chat), computing.ask(text)
    assert heard.finished.usage.prompt_tokens == plain.finished.usage.prompt_tokens
    assert heard.ids() == plain.ids()


def test_scores_of_tokens_and_prompt_are_log_probabilities(computing: Asker) -> None:
    heard = computing.ask(logprobs=3, prompt_logprobs=True, max_tokens=4)
    assert heard.finished
    [scored] = [event for event in heard.events if isinstance(event, PromptScored)]
    assert [token.token_id for token in scored.tokens] == PROMPT
    assert scored.tokens[0].logprob is None
    for token in (*scored.tokens[1:], *heard.tokens()):
        assert token.logprob is not None
        assert token.logprob <= 0.0
        assert len(token.top_logprobs) == 3
        best = [top.logprob for top in token.top_logprobs]
        assert best == sorted(best, reverse=True)
        assert math.fsum(map(math.exp, best)) <= 1.001
    for token in heard.tokens():  # greedy takes the most probable
        assert token.top_logprobs[0].token_id == token.token_id


def test_a_prompt_can_be_scored_without_generating(computing: Asker) -> None:
    heard = computing.ask(logprobs=0, prompt_logprobs=True, max_tokens=0)
    assert heard.finished.finish_reasons == ("length",)
    assert not heard.tokens()
    assert any(isinstance(event, PromptScored) for event in heard.events)


def test_the_same_seed_gives_the_same_tokens(computing: Asker) -> None:
    first, second, other = (
        computing.ask(temperature=1.0, seed=seed, max_tokens=12) for seed in (5, 5, 6)
    )
    assert first.finished
    assert second.finished
    assert other.finished
    assert first.ids() == second.ids() != other.ids()


def test_a_stop_string_ends_the_answer_before_it(computing: Asker) -> None:
    whole = computing.ask(max_tokens=24)
    assert whole.finished
    text = whole.text()
    stop = text[6:8]
    heard = computing.ask(max_tokens=24, stop=(stop,))
    assert heard.finished.finish_reasons == ("stop",)
    assert heard.text() == text[: text.index(stop)]


def test_an_answer_is_what_its_constraint_says(computing: Asker) -> None:
    regex = computing.ask(constraint=Regex(pattern="(yes|no)!"), max_tokens=20, ignore_eos=False)
    assert regex.finished.finish_reasons == ("stop",)
    assert regex.text() in ("yes!", "no!")
    schema = JsonSchema(definition='{"enum": ["a", "b"]}')
    heard = computing.ask(constraint=schema, max_tokens=40, ignore_eos=False)
    assert heard.finished
    assert heard.text().strip() in ('"a"', '"b"')
    bad = computing.ask(constraint=Regex(pattern="(("), ignore_eos=False)
    assert bad.failure_code == "invalid_constraint"


def test_a_resumed_answer_goes_on_after_its_prefix(computing: Asker) -> None:
    whole = computing.ask(max_tokens=12)
    assert whole.finished
    resumed = computing.ask(max_tokens=12, prefix=tuple(whole.ids()[:5]))
    assert resumed.finished.usage.output_tokens == 7
    assert resumed.ids() == whole.ids()[5:]
    assert [token.position for token in resumed.tokens()] == list(range(5, 12))


def test_the_same_attempt_twice_is_refused_the_second_time(computing: Asker) -> None:
    first = computing.ask(max_tokens=100)
    assert computing.last_task is not None
    second = computing.submit(computing.last_task)
    assert second.failure_code == "invalid_parameter"
    assert first.finished


def test_device_seconds_are_told(computing: Asker) -> None:
    before = computing.engine.load().busy_s
    asked = [computing.ask(max_tokens=12) for _ in range(4)]
    shares = [heard.finished.usage.device_s for heard in asked]
    assert all(share > 0.0 for share in shares)
    spent_s = computing.engine.load().busy_s - before
    assert sum(shares) == pytest.approx(spent_s, rel=0.05, abs=0.05)


# ---- engines that embed --------------------------------------------------------------------------


def test_a_prompt_is_accepted_then_embedded_then_finished(embedding: Asker) -> None:
    heard = embedding.embed()
    usage = heard.finished.usage
    assert [event.type for event in heard.events] == ["accepted", "embedding", "finished"]
    assert isinstance(heard.events[0], Accepted)
    assert heard.events[0].prompt_tokens == len(PROMPT) == usage.prompt_tokens
    assert usage.output_tokens == 0
    assert heard.finished.finish_reasons == ("stop",)
    assert math.hypot(*heard.vector) == pytest.approx(1.0, abs=1e-5)


def test_prompts_at_once_get_each_their_own_vector(embedding: Asker) -> None:
    prompts = [list(range(60, 61 + number)) for number in range(12)]
    asked = [embedding.embed(ids) for ids in prompts]
    for ids, heard in zip(prompts, asked, strict=True):
        alone = embedding.embed(ids)
        assert heard.vector == pytest.approx(alone.vector, abs=1e-4)
        assert heard.finished.usage.prompt_tokens == len(ids)
    assert len({tuple(heard.vector) for heard in asked}) == len(prompts)


def test_a_vector_is_as_long_as_the_model_is_wide_or_refused(embedding: Asker) -> None:
    size = len(embedding.embed().vector)
    assert len(embedding.embed(dimensions=size).vector) == size
    assert embedding.embed(dimensions=size - 1).failure_code == "invalid_parameter"


def test_a_prompt_over_the_context_is_not_embedded(embedding: Asker) -> None:
    context_tokens = embedding.engine.info.limits.context_tokens
    assert embedding.embed([1] * context_tokens).vector
    assert embedding.embed([1] * (context_tokens + 1)).failure_code == "context_length_exceeded"


def test_what_cannot_be_embedded_ends_alone(embedding: Asker) -> None:
    late = embedding.embed(list(range(60, 130)), deadline_s=1e-6)
    assert late.failure_code == "deadline_exceeded"
    if embedding.engine.info.model == "tiny":
        assert embedding.embed([9999]).failure_code == "invalid_parameter"
        assert embedding.embed("").failure_code == "invalid_parameter"
        assert embedding.embed(digest="blake3:0").failure_code == "digest_mismatch"
    assert embedding.embed().vector


# ---- the backend ---------------------------------------------------------------------------------


def test_the_backend_says_the_same_tokens_as_our_engine(vllm: Asker, ours: Asker) -> None:
    assert vllm.engine.info.digest == ours.engine.info.digest
    assert vllm.engine.info.engine.startswith("vllm ")
    for prompt in (PROMPT, "The quick brown fox", [1, 2, 3]):
        mine, theirs = (one.ask(prompt, max_tokens=16, logprobs=2) for one in (ours, vllm))
        assert mine.finished
        assert theirs.finished
        assert mine.ids() == theirs.ids()
        assert mine.text() == theirs.text()
        for a, b in zip(mine.tokens(), theirs.tokens(), strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=2e-3)


def test_what_vllm_cannot_do_is_refused(vllm: Asker) -> None:
    sampled = vllm.ask(prefix=(1, 2), temperature=1.0, seed=1)
    assert sampled.failure_code == "invalid_parameter"
    assert vllm.embed().failure_code == "invalid_parameter"


@pytest.mark.parametrize("kind", ["pooling", "sentences"])
def test_the_backends_vectors_are_those_of_our_engine(kind: str, make: Any) -> None:
    ours = Asker(make("torch" if kind == "pooling" else "sentences"))
    vllm = Asker(make(f"vllm {kind}"))
    assert vllm.engine.info.digest == ours.engine.info.digest
    assert vllm.engine.info.limits.modes == ("embed",)
    for prompt in (PROMPT, [5], "The quick brown fox", list(range(60, 160))):
        mine, theirs = (torch.tensor(one.embed(prompt).vector) for one in (ours, vllm))
        assert float(mine @ theirs) > 1.0 - 1e-3
    assert vllm.embed(pooling="mean").vector == vllm.embed().vector
    assert vllm.embed(pooling="last").failure_code == "invalid_parameter"
    assert vllm.ask().failure_code == "invalid_parameter"


def test_other_weights_are_refused_before_the_server_starts(tiny_dir: Path) -> None:
    engine = VllmEngine(
        ModelSource.parse(str(tiny_dir)),
        SIZES,
        VllmOptions(command=("false",)),
        name="tiny",
        expected_digest="blake3:0",
    )
    with pytest.raises(DigestMismatch):
        engine.start()
