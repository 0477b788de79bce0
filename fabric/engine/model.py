"""Loads a model with its tokenizer, and digests its tensors."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import Any

import blake3
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from fabric.engine.device import CPU
from fabric.engine.source import ModelSource
from fabric.errors import DigestMismatch, FabricError, ModelNotLoadable

__all__ = [
    "LOCAL",
    "LoadedModel",
    "ModelSource",
    "digest_of",
    "digest_tensors",
    "eos_ids_of",
    "load_model",
    "read_config",
    "reading",
]

_logger = getLogger(__name__)

LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""How transformers is to read a directory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model ready to run, with what the engine needs to know of it.

    ``eos_ids`` end a row, as in transformers' ``generate``. ``context_tokens`` is the longest row
    the positions allow, ``None`` where the model sets no limit.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    digest: str
    eos_ids: frozenset[int]
    context_tokens: int | None
    vocabulary: int


def load_model(
    source: ModelSource,
    *,
    name: str,
    dtype: str,
    expected_digest: str | None = None,
    headless: bool = False,
    weights: str = "as loaded",
    device: torch.device = CPU,
) -> LoadedModel:
    """Load the model and check its digest.

    Args:
        source: Where its files are.
        name: What errors call it.
        dtype: ``float32`` or ``bfloat16``, of all tensors. The digest is of tensors in this dtype.
        expected_digest: As ``digest_of`` gives it; ``None`` takes any.
        weights: How they will be computed; see ``digest_of``.
        headless: Whether only its hidden states are wanted; encoders can be loaded so too.
        device: Where it goes once it is digested.

    Raises:
        ModelNotLoadable: Files are missing, damaged or of a kind that cannot be served.
        DigestMismatch: The tensors are not those of ``expected_digest``.
    """
    started = time.perf_counter()
    path = source.resolve()
    transformers_logging.disable_progress_bar()
    with reading(source, name=name):
        model, tokenizer = _read(path, getattr(torch, dtype), headless=headless)
    model.eval().requires_grad_(False)
    read_s = time.perf_counter() - started
    digest = digest_of(model, weights=weights)
    if expected_digest is not None and digest != expected_digest:
        raise DigestMismatch(name=name, expected=expected_digest, actual=digest)
    _logger.info(
        "model loaded",
        extra={
            "model": name,
            "digest": digest,
            "read_s": round(read_s, 3),
            "digest_s": round(time.perf_counter() - started - read_s, 3),
        },
    )
    return LoadedModel(
        model=model.to(device),
        tokenizer=tokenizer,
        digest=digest,
        eos_ids=eos_ids_of(model, tokenizer),
        context_tokens=getattr(model.config, "max_position_embeddings", None),
        vocabulary=model.get_input_embeddings().weight.shape[0],
    )


def digest_of(model: PreTrainedModel, *, weights: str = "as loaded") -> str:
    """Return ``blake3:<hex>`` over the tensors' names, dtypes, shapes and bytes, sorted by name.

    Tied tensors count once, under the name that sorts first. ``weights`` is counted where they are
    computed in another form than loaded: answers are another version's then.
    """
    untied: dict[tuple[int, torch.Size], tuple[str, torch.Tensor]] = {}
    for name, tensor in sorted(model.state_dict().items()):
        untied.setdefault((tensor.data_ptr(), tensor.shape), (name, tensor))
    return digest_tensors(untied.values(), weights=weights)


def digest_tensors(
    tensors: Iterable[tuple[str, torch.Tensor]], *, weights: str = "as loaded"
) -> str:
    """Return ``digest_of`` for tensors that come in the order of their names.

    Bytes are little-endian and row-major, as in a safetensors file.
    """
    hasher = blake3.blake3(max_threads=blake3.blake3.AUTO)
    if weights != "as loaded":
        hasher.update(f"weights\0{weights}\0".encode())
    for name, tensor in tensors:
        dtype = str(tensor.dtype).removeprefix("torch.")
        hasher.update(f"{name}\0{dtype}\0{list(tensor.shape)}\0".encode())
        flat = tensor.detach().contiguous().reshape(-1)
        hasher.update(memoryview(flat.view(torch.uint8).numpy()))
    return f"blake3:{hasher.hexdigest()}"


@contextlib.contextmanager
def reading(source: ModelSource, *, name: str) -> Iterator[None]:
    """Make one error of all that may go wrong while a model's files are read.

    Raises:
        ModelNotLoadable: The block raised what is not ours.
    """
    try:
        yield
    except FabricError:
        raise
    except Exception as error:  # the parsers raise whatever a file they did not foresee makes them
        reason = f"{type(error).__name__}: {error}".strip().rstrip(".:")
        raise ModelNotLoadable(model=name, reason=f"{source} cannot be read ({reason})") from error


def read_config(path: Path) -> PreTrainedConfig:
    """Return the configuration in a transformers directory.

    Raises:
        ModelNotLoadable: It wants code of its own, or is of a kind that cannot be served.
    """
    if "auto_map" in json.loads((path / "config.json").read_text()):
        raise ModelNotLoadable(
            model=str(path),
            reason="its config.json names code of its own (auto_map), which is never run;"
            " convert it to an architecture that transformers has",
        )
    config = AutoConfig.from_pretrained(path, **LOCAL)
    if config.is_encoder_decoder:
        raise ModelNotLoadable(
            model=str(path), reason=f"{config.model_type} is an encoder-decoder, not a causal model"
        )
    return config


def _read(
    path: Path, dtype: torch.dtype, *, headless: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    if path.is_file():
        from fabric.engine.gguf import load_gguf  # a directory needs no GGUF reader

        return load_gguf(path, dtype)
    config = read_config(path)
    auto = AutoModel if headless else AutoModelForCausalLM
    model = auto.from_pretrained(path, config=config, dtype=dtype, use_safetensors=True, **LOCAL)
    if getattr(model, "pooler", None) is not None:
        # For classifying: no hidden state comes from it, and files without it get a random one.
        model.pooler = None
    return model, AutoTokenizer.from_pretrained(path, **LOCAL)


def eos_ids_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """Return the tokens that end a row, as in transformers' ``generate``."""
    generation = getattr(model, "generation_config", None)
    for owner in (generation, model.config, tokenizer):
        ids = getattr(owner, "eos_token_id", None)
        if ids is not None:
            return frozenset([ids] if isinstance(ids, int) else ids)
    return frozenset()
