"""PEFT's two files of an adapter, made by hand. Free of torch."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping


def peft_config(**changes: object) -> bytes:
    """Return an ``adapter_config.json`` of rank 2 for ``q_proj``."""
    fields: dict[str, object] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "bias": "none",
    }
    return json.dumps(fields | changes).encode()


def factor(rows: int, columns: int, start: float = 0.5) -> tuple[tuple[int, int], list[float]]:
    """Return the shape and the numbers of a factor."""
    return (rows, columns), [start + 0.125 * (i % 7) for i in range(rows * columns)]


def peft_weights(
    tensors: Mapping[str, tuple[tuple[int, ...], Iterable[float]]] | None = None,
    *,
    start: float = 0.5,
) -> bytes:
    """Return an ``adapter_model.safetensors`` in float32: of one ``q_proj`` unless said."""
    if tensors is None:
        layer = "base_model.model.model.layers.0.self_attn.q_proj"
        tensors = {
            f"{layer}.lora_A.weight": factor(2, 8, start),
            f"{layer}.lora_B.weight": factor(8, 2, start),
        }
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    body = b""
    for name, (shape, numbers) in tensors.items():
        data = b"".join(struct.pack("<f", number) for number in numbers)
        header[name] = {
            "dtype": "F32",
            "shape": shape,
            "data_offsets": (len(body), len(body) + len(data)),
        }
        body += data
    head = json.dumps(header).encode()
    return len(head).to_bytes(8, "little") + head + body
