"""A sentence-embedding model as its directory describes it: tokenizer, encoder and pooling."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fabric.engine.device import CPU
from fabric.engine.model import LoadedModel, load_model
from fabric.engine.pooling import Kind, check_dimensions, pool
from fabric.engine.source import ModelSource
from fabric.engine.text import Texts
from fabric.errors import ContextExceeded, ModelNotLoadable, RequestInvalid
from fabric.messages import ProgramInput, Request

_CHARS_PER_TOKEN = 16
"""So many times the longest text is tokenized before its length is known: encoders drop blanks."""

_KINDS: dict[str, Kind] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_cls_token": "first",
    "mean": "mean",
    "lasttoken": "last",
    "cls": "first",
}
"""By sentence-transformers' names, old and new."""

_PARTS = ("Transformer", "Pooling", "Normalize")


@dataclass(frozen=True, slots=True, kw_only=True)
class SentenceFormat:
    """What a sentence-transformers directory says about its model.

    Args:
        pooling: Which hidden states make the vector.
        context_tokens: The longest text in tokens; ``None``: as long as the positions allow.
    """

    pooling: Kind
    context_tokens: int | None

    @staticmethod
    def read(path: Path) -> SentenceFormat:
        """Read the directory's own files.

        Raises:
            ModelNotLoadable: It has a part or a pooling that is not served.
        """
        parts = json.loads((path / "modules.json").read_text())
        kinds = [str(part["type"]).rpartition(".")[2] for part in parts]
        if kinds[:2] != ["Transformer", "Pooling"] or not set(kinds) <= set(_PARTS):
            raise ModelNotLoadable(
                model=str(path),
                reason=f"its modules.json lists {', '.join(kinds)}; what is served is a"
                " Transformer, a Pooling and a Normalize",
            )
        pooling = json.loads((path / parts[1]["path"] / "config.json").read_text())
        asked = [name for name, on in pooling.items() if name.startswith("pooling_mode_") and on]
        asked = asked or [str(pooling.get("pooling_mode"))]
        if len(asked) != 1 or asked[0] not in _KINDS:
            raise ModelNotLoadable(
                model=str(path),
                reason=f"it pools by {' and '.join(asked)}; what is served is one of mean, cls and"
                " lasttoken",
            )
        limits = path / parts[0]["path"] / "sentence_bert_config.json"
        stated = json.loads(limits.read_text()) if limits.is_file() else {}
        return SentenceFormat(
            pooling=_KINDS[asked[0]],
            context_tokens=stated.get("max_seq_length"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SentenceModel:
    """A sentence-embedding model that is loaded.

    ``context_tokens`` is its longest text, and ``texts`` its tokenizer, which neither cuts nor
    pads.
    """

    loaded: LoadedModel
    pooling: Kind
    context_tokens: int
    texts: Texts


def load_sentence_model(
    source: ModelSource,
    *,
    name: str,
    dtype: str,
    expected_digest: str | None = None,
    context_tokens: int | None = None,
    device: torch.device = CPU,
) -> SentenceModel:
    """Load what a sentence-transformers directory describes.

    Args:
        source: The directory.
        name: What errors call the model.
        dtype: ``float32`` or ``bfloat16``.
        expected_digest: Of the tensors in this dtype; ``None`` takes any.
        context_tokens: The longest text; ``None``: as long as the model allows.
        device: Where it goes.

    Raises:
        ModelNotLoadable: Files are missing, damaged or of a kind that cannot be served.
        DigestMismatch: The tensors are not those of ``expected_digest``.
    """
    form = SentenceFormat.read(source.resolve())
    loaded = load_model(
        source,
        name=name,
        dtype=dtype,
        expected_digest=expected_digest,
        headless=True,
        device=device,
    )
    tokenizer = loaded.tokenizer
    stated = (form.context_tokens, loaded.context_tokens, context_tokens)
    longest = min(tokenizer.model_max_length, *filter(None, stated))
    # Some files cut and pad every text to one length; ours are refused if they are too long.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    texts = Texts(
        tokenizer, vocabulary=loaded.vocabulary, context_tokens=longest * _CHARS_PER_TOKEN
    )
    return SentenceModel(loaded=loaded, pooling=form.pooling, context_tokens=longest, texts=texts)


class Encoder:
    """Embeds texts with a sentence-embedding model.

    Args:
        sentences: The model.
    """

    def __init__(self, sentences: SentenceModel) -> None:
        loaded = sentences.loaded
        self.context_tokens = sentences.context_tokens
        self.digest = loaded.digest
        self._model = loaded.model
        self._pooling = sentences.pooling
        self._pad_id = loaded.tokenizer.pad_token_id or 0
        self._texts = sentences.texts

    def tokenize(self, request: Request) -> list[int]:
        """Return the ids of a request's text.

        Raises:
            RequestInvalid: It is not to be embedded, or is no text of this model.
            ContextExceeded: It is too long.
        """
        if request.mode != "embed" or isinstance(request.input, ProgramInput):
            raise RequestInvalid(param="mode", value=request.mode, reason="this model only embeds")
        check_dimensions(request, self._model.config.hidden_size)
        ids = self._texts.prompt_ids(request.input)
        if len(ids) > self.context_tokens:
            raise ContextExceeded(
                prompt_tokens=len(ids), max_tokens=0, context_tokens=self.context_tokens
            )
        return ids

    def embed(self, texts: Sequence[tuple[list[int], Kind | None]]) -> torch.Tensor:
        """Return the vectors of texts, not normalised.

        Args:
            texts: Token ids, and how they are pooled if not as the model was made.

        Returns:
            [B, H] in float32.
        """
        longest = max(len(ids) for ids, _ in texts)
        ids_BT = torch.full((len(texts), longest), self._pad_id)
        mask_BT = torch.zeros_like(ids_BT)
        for row, (ids, _) in enumerate(texts):
            ids_BT[row, : len(ids)] = torch.tensor(ids)
            mask_BT[row, : len(ids)] = 1
        with torch.inference_mode():
            ids_BT, mask_BT = ids_BT.to(self._model.device), mask_BT.to(self._model.device)
            hidden_BTH = self._model(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state
            return pool(hidden_BTH, mask_BT, [kind or self._pooling for _, kind in texts])
