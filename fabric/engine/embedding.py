"""The engine of sentence-embedding models: encoders, which the continuous batch does not serve."""

from __future__ import annotations

from fabric.engine.device import choose_device, describe
from fabric.engine.encoder import Encoder, load_sentence_model
from fabric.engine.encoder_batch import EncoderBatch
from fabric.engine.interface import EngineInfo
from fabric.engine.torch_engine import VERSIONS, TorchEngine
from fabric.errors import ModelNotLoadable
from fabric.messages import Limits

__all__ = ["EmbeddingEngine"]


class EmbeddingEngine(TorchEngine):
    """An ``Engine`` that only embeds, over a sentence-transformers directory.

    It has the ``TorchEngine``'s thread and arguments, and a batch of its own.
    """

    def _build(self) -> EncoderBatch:
        config = self._config
        if config.num_ranks > 1 or config.offload != "none":
            raise ModelNotLoadable(
                model=self._name,
                reason="sentence-embedding models run in one process, in memory; leave"
                " tensor_parallel, pipeline_parallel and offload out",
            )
        device = choose_device(config)
        sentences = load_sentence_model(
            self._source,
            name=self._name,
            dtype=config.dtype,
            expected_digest=self._expected_digest,
            context_tokens=config.context_tokens,
            device=device,
        )
        encoder = Encoder(sentences)
        self._info = EngineInfo(
            model=self._name,
            digest=encoder.digest,
            limits=Limits(
                context_tokens=encoder.context_tokens,
                max_rows=config.max_rows,
                cache_tokens=encoder.context_tokens * config.max_rows,
                modes=("embed",),
            ),
            dtype=config.dtype,
            engine=VERSIONS + describe(device),
        )
        return EncoderBatch(encoder, config)
