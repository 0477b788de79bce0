"""A program's constants: bytes verified, declared tensors bounded, nothing allocated."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import math
from dataclasses import dataclass

from pydantic import TypeAdapter, ValidationError

from fabric.errors import ProgramInvalid, ProgramTooLarge
from fabric.messages.nodes import MAX_AXES, Name
from fabric.messages.program import Program

MAX_TENSORS = 16_384
MAX_HEADER_BYTES = 4 * 2**20
_LENGTH_BYTES = 8
_NAME: TypeAdapter[str] = TypeAdapter(Name)

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "I64": "int64", "BOOL": "bool"}
"""What safetensors calls the dtypes of the wire."""
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "bool": 1}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor without its numbers."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """What its numbers take."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def read_constants(program: Program) -> bytes | None:
    """Return the constants that a program carries; ``None`` where it has none or a handle.

    Raises:
        ProgramInvalid: They are not base64, or not of the size and SHA-256 that it declares.
    """
    if program.consts is None or program.consts.data is None:
        return None
    try:
        data = base64.b64decode(program.consts.data, validate=True)
    except (binascii.Error, ValueError):
        raise ProgramInvalid(reason="its constants are not base64") from None
    verify_constants(program, data)
    return data


def verify_constants(program: Program, data: bytes) -> None:
    """Hold fetched bytes to what the program declares of its constants.

    Raises:
        ProgramInvalid: The size or the SHA-256 is another one, or it declares none.
    """
    if program.consts is None:
        raise ProgramInvalid(reason="it declares no constants and was given some")
    if len(data) != program.consts.size:
        raise ProgramInvalid(
            reason=f"its constants have {len(data)} bytes and it declares {program.consts.size}"
        )
    actual = hashlib.sha256(data).hexdigest()
    if actual != program.consts.sha256:
        raise ProgramInvalid(
            reason=f"its constants have the sha256 {actual} and it declares {program.consts.sha256}"
        )


def read_header(data: bytes) -> dict[str, TensorSpec]:
    """Return the tensors that a safetensors file declares, once all of it is found consistent.

    The header's length, names, dtypes, shapes and offsets must be what they should, and the
    tensors must lie one after the other, without gap or overlap, to the end of the file.

    Raises:
        ProgramInvalid: It is not such a file, or its header lies.
        ProgramTooLarge: The header or the number of tensors is over its bound.

    Source: https://huggingface.co/docs/safetensors/index (format).
    """
    tensors: dict[str, TensorSpec] = {}
    ranges: list[tuple[int, int, str]] = []
    header, start = _header(data)
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            _NAME.validate_python(name)
        except ValidationError:
            raise _lie(f"{name[:128]!r} cannot be the name of a constant") from None
        spec, begin, end = _entry(name, entry)
        if end - begin != spec.num_bytes:
            raise _lie(f"{name!r} has {end - begin} bytes for {list(spec.shape)} of {spec.dtype}")
        tensors[name] = spec
        ranges.append((begin, end, name))
    last = 0
    for begin, end, name in sorted(ranges):
        if begin != last:
            raise _lie(f"{name!r} begins at {begin} and the tensor before it ends at {last}")
        last = end
    if start + last != len(data):
        raise _lie(f"its tensors end at {start + last} and the file at {len(data)}")
    return tensors


def _header(data: bytes) -> tuple[dict[str, object], int]:
    if len(data) < _LENGTH_BYTES:
        raise _lie(f"it has {len(data)} bytes")
    length = int.from_bytes(data[:_LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise ProgramTooLarge(
            cap="header of constants, bytes", value=length, limit=MAX_HEADER_BYTES
        )
    start = _LENGTH_BYTES + length
    if start > len(data):
        raise _lie(f"its header would end at {start} and the file ends at {len(data)}")
    try:
        header = json.loads(data[_LENGTH_BYTES:start], object_pairs_hook=_once)
    except (ValueError, RecursionError):
        raise _lie("its header is not JSON with every name once") from None
    if not isinstance(header, dict):
        raise _lie("its header is not an object")
    if len(header) > MAX_TENSORS:
        raise ProgramTooLarge(cap="number of constants", value=len(header), limit=MAX_TENSORS)
    return header, start


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice")
    return found


def _entry(name: str, entry: object) -> tuple[TensorSpec, int, int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _lie(f"{name!r} must have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _lie(f"{name!r} has the dtype {str(dtype)[:32]!r}; use one of {', '.join(DTYPES)}")
    if not _are_counts(shape) or len(shape) > MAX_AXES:
        raise _lie(f"{name!r} has the shape {str(shape)[:128]}; it takes at most {MAX_AXES} sizes")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _lie(f"{name!r} has the offsets {str(offsets)[:128]}")
    return TensorSpec(tuple(shape), DTYPES[dtype]), offsets[0], offsets[1]


def _are_counts(values: object) -> bool:
    # JSON's true is an int in Python, and its integers have no bound.
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**40 for v in values)


def _lie(reason: str) -> ProgramInvalid:
    return ProgramInvalid(reason=f"its constants are no safetensors file as declared: {reason}")
