"""numpy arrays as safetensors and back, without torch.

bfloat16 arrives as float32, which holds it exactly: numpy has no such type.
Source: https://github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fabric.errors import PayloadInvalid

Array = npt.NDArray[Any]

_NAMES: dict[np.dtype[Any], str] = {
    np.dtype("<f4"): "F32",
    np.dtype("<f2"): "F16",
    np.dtype("<i8"): "I64",
    np.dtype("?"): "BOOL",
}
_DTYPES: dict[str, np.dtype[Any]] = {
    **{name: dtype for dtype, name in _NAMES.items()},
    "BF16": np.dtype("<u2"),
    "F64": np.dtype("<f8"),
    "I32": np.dtype("<i4"),
    "U8": np.dtype("u1"),
}


def as_array(value: object) -> Array:
    """Return what a program can hold of an array, a torch tensor, a list or a number.

    Returns:
        float32, float16, int64 or bool; in rows, contiguous.

    Raises:
        TypeError: It is made of something else than real numbers.
    """
    if hasattr(value, "detach"):
        tensor = value.detach().cpu()
        value = tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor
    array = np.asarray(value)
    if array.dtype.kind == "f" and array.dtype != np.float16:
        array = array.astype("<f4")
    elif array.dtype.kind in "iu":
        array = array.astype("<i8")
    if array.dtype.newbyteorder("<") not in _NAMES:
        raise TypeError(f"{type(value).__name__} of {array.dtype} are not real numbers")
    return np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")


def write_tensors(arrays: Mapping[str, Array], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return arrays as one safetensors file; equal arrays give equal bytes."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    parts: list[bytes] = []
    begin = 0
    for name, array in sorted(arrays.items()):
        parts.append(array.tobytes())
        end = begin + len(parts[-1])
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    return b"".join((len(head).to_bytes(8, "little"), head, *parts))


def read_tensors(data: bytes) -> tuple[dict[str, Array], dict[str, str]]:
    """Return the arrays of a safetensors file, by name, and its metadata.

    Raises:
        PayloadInvalid: It is no such file, or its header does not fit its bytes.
    """
    try:
        size = int.from_bytes(data[:8], "little")
        if len(data) < 8 or size > len(data) - 8:
            raise ValueError("it ends within its header")
        header = json.loads(data[8 : 8 + size])
        metadata = header.pop("__metadata__", {})
        body = memoryview(data)[8 + size :]
        return {name: _read(body, entry) for name, entry in header.items()}, metadata
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PayloadInvalid(
            what="A safetensors file", reason=str(error) or type(error).__name__
        ) from error


def join(
    steps: Sequence[tuple[Mapping[str, Array], Mapping[str, str]]],
) -> tuple[dict[str, Array], dict[str, str]]:
    """Return what was saved in several steps as one: along the positions, or side by side."""
    arrays: dict[str, Array] = {}
    metadata: dict[str, str] = {}
    for name in dict.fromkeys(name for saves, _ in steps for name in saves):
        parts = [saves[name] for saves, _ in steps if name in saves]
        key = f"positions:{name}"
        places = [json.loads(facts[key]) for _, facts in steps if key in facts]
        if places:
            metadata[key] = json.dumps([position for some in places for position in some])
        if len(parts) == 1:
            arrays[name] = parts[0]
        else:
            arrays[name] = np.concatenate(parts) if places else np.stack(parts)
    return arrays, metadata


def _read(body: memoryview, entry: Mapping[str, Any]) -> Array:
    dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if not 0 <= begin <= end <= len(body) or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"the offsets {begin} to {end} are not those of shape {list(shape)}")
    array: Array = np.frombuffer(body[begin:end], dtype)
    if entry["dtype"] == "BF16":
        array = (array.astype("<u4") << 16).view("<f4")
    return array.reshape(shape).copy()
