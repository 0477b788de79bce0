"""Prompts as vectors: of decoders in the continuous batch, of encoders in their own engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertModel

from fabric.engine.config import EngineConfig
from fabric.engine.embedding import EmbeddingEngine
from fabric.engine.encoder import Encoder, load_sentence_model
from fabric.engine.encoder_batch import EncoderBatch
from fabric.engine.source import ModelSource
from fabric.errors import (
    ContextExceeded,
    DeadlineExceeded,
    ModelNotLoadable,
    RequestCancelled,
    RequestInvalid,
    RowFailed,
)
from fabric.messages import EMBED_SAMPLING, Request, Task, TextInput
from fabric.testing.tiny_model import save_tiny_sentences

TOLERANCE = 1e-5
PROMPTS = [[5], list(range(60, 77)), [9] * 40, list(range(100)), list(range(200, 60, -1))]


def distance(one, other) -> float:
    return float((torch.as_tensor(one) - torch.as_tensor(other)).abs().max())


def hidden_states(model, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([ids])).last_hidden_state[0]


def normalised(vector: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(vector, dim=0)


# ---- decoders ------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", [None, "mean", "last"])
def test_vectors_are_transformers_hidden_states_pooled(tiny, reference, pooling) -> None:
    # Longer than a step, shorter, and beside rows that generate.
    busy = [tiny.greedy([3, number], 30) for number in range(4)]
    asked = [tiny.embed(ids, pooling=pooling) for ids in PROMPTS]
    for ids, heard in zip(PROMPTS, asked, strict=True):
        hidden = hidden_states(reference.model, ids)
        expected = normalised(hidden[-1] if pooling == "last" else hidden.mean(0))
        assert distance(heard.vector, expected) < TOLERANCE
        usage = heard.finished.usage
        assert (usage.prompt_tokens, usage.output_tokens) == (len(ids), 0)
        assert [event.type for event in heard.events] == ["accepted", "embedding", "finished"]
    for number, heard in enumerate(busy):
        alone = tiny.greedy([3, number], 30)
        heard.wait(), alone.wait()
        assert heard.ids() == alone.ids()


def test_a_prompt_that_others_have_computed_has_the_same_vector(tiny, reference) -> None:
    ids = list(range(40, 140))
    tiny.greedy(ids, 2, cache_salt="one").wait()
    first, second = (tiny.embed(ids, cache_salt="one").vector for _ in range(2))
    expected = normalised(hidden_states(reference.model, ids).mean(0))
    assert distance(first, expected) < TOLERANCE
    assert distance(second, expected) < TOLERANCE


def test_a_prompt_that_gave_its_cache_up_has_the_same_vector(drive, reference) -> None:
    small = drive(cache_bytes=160 * 2 * 2 * 2 * 16 * 4, max_rows=8)
    busy = [small.greedy([number] * 60, 60, tier="interactive") for number in range(4)]
    ids = list(range(100))
    asked = [small.embed(ids, tier="batch") for _ in range(3)]
    busy += [small.greedy([number] * 60, 60, tier="interactive") for number in range(4)]
    expected = normalised(hidden_states(reference.model, ids).mean(0))
    for heard in asked:
        assert distance(heard.vector, expected) < TOLERANCE
    for heard in busy:
        assert heard.finished
    assert small.engine.load().num_preempted > 0


def test_a_decoder_refuses_what_it_cannot_embed(tiny) -> None:
    assert tiny.embed("x", dimensions=64).vector
    assert tiny.embed("x", dimensions=63).failed.failure.code == RequestInvalid.code
    assert tiny.embed([7] * 257).failed.failure.code == ContextExceeded.code
    assert tiny.embed([999]).failed.failure.code == RequestInvalid.code


def test_hidden_states_that_are_not_finite_end_their_own_task(drive, tiny_llama, save_model):
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[8] = float("nan")
    broken = drive(save_model(model))
    bad, good = broken.embed([5, 8, 5]), broken.embed([5, 9, 5])
    assert bad.failed.failure.code == RowFailed.code
    assert good.vector


# ---- encoders ------------------------------------------------------------------------------------


@pytest.fixture
def sentence_dir(tmp_path: Path) -> Callable[..., Path]:
    """Write a tiny random BERT as sentence-transformers does."""
    return partial(save_tiny_sentences, tmp_path / "sentences")


@pytest.fixture
def start() -> Iterator[Callable[[Path], EmbeddingEngine]]:
    engines = []

    def start(path: Path) -> EmbeddingEngine:
        config = EngineConfig(dtype="float32", num_threads=1, max_rows=16, step_tokens=120)
        engine = EmbeddingEngine(ModelSource.parse(str(path)), config, name="tiny")
        engines.append(engine)
        engine.start()
        return engine

    yield start
    for engine in engines:
        engine.close()


@pytest.mark.parametrize("pooling", ["mean_tokens", "cls_token", "lasttoken"])
def test_padding_and_company_leave_no_trace_in_an_encoders_vectors(
    sentence_dir, start, driver_of, pooling
) -> None:
    path = sentence_dir(pooling)
    drive = driver_of(start(path))
    model = BertModel.from_pretrained(path).eval()
    prompts = [ids[:100] for ids in PROMPTS]
    asked = [drive.embed(ids) for ids in prompts * 5]
    for ids, heard in zip(prompts * 5, asked, strict=True):
        hidden = hidden_states(model, ids)
        wanted = {"cls_token": hidden[0], "lasttoken": hidden[-1]}.get(pooling, hidden.mean(0))
        assert distance(heard.vector, normalised(wanted)) < TOLERANCE
        assert heard.finished.usage.prompt_tokens == len(ids)
    last = drive.embed(prompts[3], pooling="last").vector
    assert distance(last, normalised(hidden_states(model, prompts[3])[-1])) < TOLERANCE


def test_an_encoder_refuses_what_it_cannot_embed_and_goes_on(
    sentence_dir, start, driver_of
) -> None:
    drive = driver_of(start(sentence_dir()))
    assert drive.engine.info.limits.context_tokens == 100
    assert drive.embed([7] * 101).failed.failure.code == ContextExceeded.code
    assert drive.embed("x" * 100_000).failed.failure.code == ContextExceeded.code
    assert drive.embed([999]).failed.failure.code == RequestInvalid.code
    assert drive.embed("x", dimensions=31).failed.failure.code == RequestInvalid.code
    assert drive.greedy("x", 2).failed.failure.code == RequestInvalid.code
    assert drive.embed("x").vector
    drive.engine.close()
    assert drive.embed("x").failed.failure.code == "engine_stopped"


def test_texts_that_nobody_waits_for_are_not_computed(sentence_dir, heard) -> None:
    source = ModelSource.parse(str(sentence_dir()))
    encoder = Encoder(load_sentence_model(source, name="tiny", dtype="float32"))
    batch = EncoderBatch(encoder, EngineConfig(max_rows=4))

    def add(age_s: float) -> tuple[Task, Any]:
        text = TextInput(text="x")
        request = Request(mode="embed", model="tiny", input=text, sampling=EMBED_SAMPLING)
        task = Task(
            id=request.id, attempt=1, request=request, digest=encoder.digest, deadline_s=60.0
        )
        batch.add(task, sink := heard(), received_at=time.monotonic() - age_s)
        return task, sink

    (gone, cancelled), (_, late), (_, kept) = add(0.0), add(61.0), add(0.0)
    batch.cancel(gone.id, 1)
    batch.cancel("unknown", 1)
    batch.step()
    assert cancelled.failed.failure.code == RequestCancelled.code
    assert late.failed.failure.code == DeadlineExceeded.code
    assert kept.vector
    assert not batch.busy


def test_a_broken_encoder_fails_its_texts_and_nothing_hangs(sentence_dir, start, driver_of):
    path = sentence_dir()
    tensors = load_file(path / "model.safetensors")
    tensors["embeddings.word_embeddings.weight"][8] = float("nan")
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    drive = driver_of(start(path))
    bad, good = drive.embed([5, 8]), drive.embed([5, 9])
    assert bad.failed.failure.code == RowFailed.code
    assert good.vector


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"pooling": "max_tokens"}, "max_tokens"),
        ({"parts": ("Dense",)}, "Dense"),
    ],
)
def test_parts_that_are_not_computed_are_refused(sentence_dir, start, asked, reason) -> None:
    with pytest.raises(ModelNotLoadable, match=reason):
        start(sentence_dir(**asked))
