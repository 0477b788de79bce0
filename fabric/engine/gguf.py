"""Reads a GGUF file into transformers objects: configuration, tokenizer, tensors.

transformers' own ``from_pretrained(..., gguf_file=...)`` parses the file four times, needs
accelerate, and gives Llama tokenizers the wrong end-of-sequence token. This goes through the same
conversion tables (``load_gguf_checkpoint``), so the same architectures load with the same weights.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers import modeling_gguf_pytorch_utils as conversion
from transformers.integrations.ggml import convert_gguf_tokenizer

_GROUP_ROWS = 512
"""Rows that are dequantized together: as many as stay in the processor's cache."""


def load_gguf(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Return the model, dequantized to ``dtype``, and the tokenizer of a GGUF file.

    Raises:
        ValueError: The file is not GGUF.
        Exception: Whatever transformers raises for an architecture it cannot convert and for files
            it does not foresee; ``load_model`` makes a ``ModelNotLoadable`` of it.
    """
    with _quick_conversion():
        header = conversion.load_gguf_checkpoint(str(path))
        config = AutoConfig.for_model(**header["config"])
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config)
        tensors = conversion.load_gguf_checkpoint(
            str(path), return_tensors=True, model_to_load=skeleton, torch_dtype=dtype
        )["tensors"]
    model = type(skeleton).from_pretrained(None, config=config, state_dict=tensors, dtype=dtype)
    return model, _tokenizer(header)


def read_gguf_config(path: Path) -> PreTrainedConfig:
    """Return the configuration of a GGUF file, as ``load_gguf`` has it."""
    with _quick_conversion():
        header = conversion.load_gguf_checkpoint(str(path))
        return AutoConfig.for_model(**header["config"])


def _tokenizer(header: dict[str, Any]) -> PreTrainedTokenizerFast:
    vocabulary = header["tokenizer"]
    backend, _ = convert_gguf_tokenizer(header["config"]["model_type"], vocabulary)
    # The conversion returns bos_token as eos_token; the ids in the file are right.
    named = {
        name: vocabulary["tokens"][vocabulary[f"{name}_id"]]
        for name in ("bos_token", "eos_token", "unk_token", "pad_token")
        if vocabulary.get(f"{name}_id") is not None
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=header["tokenizer_config"].get("chat_template"),
        clean_up_tokenization_spaces=False,
        **named,
    )


class _Reader(gguf.GGUFReader):  # type: ignore[misc]
    """A reader without the cost of slicing a memory map once per string of the vocabulary.

    Should a later gguf not call ``_get``, loading is slower and otherwise the same.
    """

    def _get(
        self, offset: int, dtype: Any, count: int = 1, override_order: str | None = None
    ) -> np.ndarray[Any, Any]:
        values = np.frombuffer(self.data, dtype, int(count), int(offset))
        order: Any = self.byte_order if override_order is None else override_order
        return values if order == "I" else values.view(values.dtype.newbyteorder(order))


@contextlib.contextmanager
def _replaced(owner: object, **attributes: object) -> Iterator[None]:
    """Let a module's attributes be others within the block."""
    before = {name: getattr(owner, name) for name in attributes}
    for name, value in attributes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def _parse_value(value: np.ndarray[Any, Any], types: list[int]) -> object:
    """Do what transformers' function of this name does, for strings without a list of bytes."""
    if types[-1] == gguf.GGUFValueType.STRING:
        return value.tobytes().decode()
    return _parse_any_value(value, types)


_parse_any_value = conversion._gguf_parse_value


def _apply_over_rows(
    convert: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]],
    arr: np.ndarray[Any, Any],
    otype: Any,
    oshape: tuple[int, ...],
) -> np.ndarray[Any, Any]:
    """Do what gguf's ``_apply_over_grouped_rows`` does, with fewer and larger groups."""
    rows = arr.reshape((-1, arr.shape[-1]))
    out = np.empty((rows.shape[0], math.prod(oshape) // rows.shape[0]), dtype=otype)
    for begin in range(0, rows.shape[0], _GROUP_ROWS):
        group = slice(begin, begin + _GROUP_ROWS)
        out[group] = convert(rows[group]).reshape(out[group].shape)
    return out.reshape(oshape)


def _quick_conversion() -> contextlib.ExitStack:
    """Let conversions share one parse of the file and one table of names, without progress bars."""
    stack = contextlib.ExitStack()
    name_map = functools.cache(gguf.get_tensor_name_map)
    reader = functools.cache(_Reader)
    stack.enter_context(_replaced(gguf, GGUFReader=reader, get_tensor_name_map=name_map))
    stack.enter_context(
        _replaced(conversion, tqdm=lambda tensors, **_: tensors, _gguf_parse_value=_parse_value)
    )
    stack.enter_context(_replaced(gguf.quants, _apply_over_grouped_rows=_apply_over_rows))
    return stack
