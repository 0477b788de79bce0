"""What a model's files say to an engine whose server holds the weights: they are read once."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from fabric.engine.config import EngineConfig
from fabric.engine.encoder import load_sentence_model
from fabric.engine.model import load_model
from fabric.engine.pooling import Kind
from fabric.engine.source import ModelSource
from fabric.engine.text import Texts
from fabric.engine.vllm.embeddings import Pooled, get_sample, pool_sample


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What is kept of a model when its weights are given up.

    Of one that embeds, ``pooling`` is how it does, and ``pooled`` are the vectors of
    ``get_sample``. Sentence-embedding models say their longest text, in ``context_tokens``, and
    have ``texts`` of their own.
    """

    tokenizer: PreTrainedTokenizerFast
    vocabulary: int
    eos_ids: frozenset[int]
    digest: str
    dimensions: int
    pooling: Kind
    pooled: Pooled | None
    context_tokens: int | None
    texts: Texts | None


def read_facts(
    source: ModelSource,
    config: EngineConfig,
    *,
    name: str,
    expected_digest: str | None,
    embeds: bool,
) -> ModelFacts:
    """Load the model, digest it, and return what is known of it.

    Raises:
        ModelNotLoadable: Files are missing, damaged or of a kind that cannot be served.
        DigestMismatch: The tensors are not those of ``expected_digest``.
    """
    pooling: Kind = "mean"
    texts = context_tokens = None
    if source.embeds_sentences:
        sentences = load_sentence_model(
            source, name=name, dtype=config.dtype, expected_digest=expected_digest
        )
        loaded, context_tokens = sentences.loaded, sentences.context_tokens
        pooling, texts = sentences.pooling, sentences.texts
    else:
        loaded = load_model(source, name=name, dtype=config.dtype, expected_digest=expected_digest)
    vocabulary = loaded.vocabulary
    pooled = pool_sample(loaded.model, get_sample(vocabulary)) if embeds else None
    width = loaded.model.get_input_embeddings().weight.shape[1]
    return ModelFacts(
        tokenizer=loaded.tokenizer,
        vocabulary=vocabulary,
        eos_ids=loaded.eos_ids,
        digest=loaded.digest,
        dimensions=width if pooled is None else len(pooled["mean"]),
        pooling=pooling,
        pooled=pooled,
        context_tokens=context_tokens,
        texts=texts,
    )
