"""Payloads as bytes: a safetensors file with the JSON in a tensor of its own.

The tensor ``value`` (U8) holds the payload's JSON, in which ``{"$tensor": NAME, "as": KIND}``
stands where tensor NAME belongs; other keys that begin with ``$`` get one more. The same payload
gives the same bytes: keys are sorted, wide types come first so that every tensor is aligned, and
``value`` is last. Any safetensors reader opens the file. Nothing is believed before it is checked,
and reading allocates no more than a small multiple of what was received.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from fabric.errors import PayloadInvalid, PayloadTooLarge
from fabric.payloads.tensors import Kind, RawTensor, from_raw, to_raw

__all__ = ["Bounds", "RawTensor", "assemble", "decode", "encode", "flatten", "read_safetensors"]

VALUE = "value"
METADATA = {"fabric": "payload/1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What a payload may have at most: bytes of all, header and JSON; tensors; nested levels."""

    max_bytes: int = 2**32
    max_header_bytes: int = 2**22
    max_json_bytes: int = 2**26
    max_tensors: int = 2**13
    max_depth: int = 64


DEFAULT_BOUNDS = Bounds()


def encode(value: Any, bounds: Bounds = DEFAULT_BOUNDS) -> bytes:
    """Return a payload as bytes.

    Tuples become lists. Arrays keep library, type and shape; scalars of numpy become arrays.

    Raises:
        PayloadInvalid: The value is not JSON, bytes and tensors all through, has a number that is
            not finite, or is nested too deep.
        PayloadTooLarge: It is over a bound.
    """
    return assemble(*flatten(value, bounds), bounds)


def flatten(value: Any, bounds: Bounds = DEFAULT_BOUNDS) -> tuple[bytes, list[RawTensor]]:
    """Return a payload's JSON and the tensors it names, ``0`` first.

    Raises:
        PayloadInvalid: As ``encode``.
        PayloadTooLarge: As ``encode``.
    """
    tensors: list[RawTensor] = []

    def walk(node: Any, depth: int) -> Any:
        if node is None or isinstance(node, bool | int | str):
            return node
        if isinstance(node, float):
            return _finite(node)
        _check_depth(depth, bounds)
        if isinstance(node, list | tuple):
            return [walk(item, depth + 1) for item in node]
        if isinstance(node, dict):
            if not all(isinstance(key, str) for key in node):
                raise PayloadInvalid(what="An object", reason="its keys are not all strings")
            return {
                f"${key}" if key.startswith("$") else key: walk(node[key], depth + 1)
                for key in sorted(node)
            }
        kind, tensor = to_raw(node)
        tensors.append(tensor)
        return {"$tensor": str(len(tensors) - 1), "as": kind}

    document = walk(value, 0)
    if len(tensors) > bounds.max_tensors:
        raise _invalid(f"it has {len(tensors)} tensors, over the {bounds.max_tensors} allowed")
    try:
        text = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    except ValueError as error:  # half a surrogate pair, or an integer of thousands of digits
        raise _invalid(f"it has no JSON ({error})") from error
    _check_size(len(text), bounds.max_json_bytes)
    return text, tensors


def assemble(text: bytes, tensors: Sequence[RawTensor], bounds: Bounds = DEFAULT_BOUNDS) -> bytes:
    """Return the container of what ``flatten`` returned.

    Raises:
        PayloadTooLarge: It is over a bound.
    """
    named = [(str(index), tensor) for index, tensor in enumerate(tensors)]
    named.sort(key=lambda one: -one[1].item_bytes)
    named.append((VALUE, RawTensor("U8", (len(text),), text)))
    header: dict[str, object] = {"__metadata__": METADATA}
    end = 0
    for name, tensor in named:
        begin, end = end, end + len(tensor.data)
        header[name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": (begin, end),
        }
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    _check_size(len(head), bounds.max_header_bytes)
    _check_size(8 + len(head) + end, bounds.max_bytes)
    return b"".join([len(head).to_bytes(8, "little"), head, *(one.data for _, one in named)])


def decode(data: bytes | bytearray | memoryview, bounds: Bounds = DEFAULT_BOUNDS) -> Any:
    """Return the payload that ``encode`` wrote; arrays are writable and hold their own data.

    torch tensors come back as such where torch is already imported, else as numpy arrays; what
    numpy cannot hold, or where it is not installed, as ``RawTensor``.

    Raises:
        PayloadInvalid: The bytes are not a payload.
        PayloadTooLarge: It is over a bound.
    """
    view = memoryview(data).cast("B")
    _check_size(len(view), bounds.max_bytes)
    tensors = read_safetensors(view, bounds)
    text = tensors.pop(VALUE, None)
    if text is None or text.dtype != "U8" or len(text.shape) != 1:
        raise _invalid(f"it has no bytes called {VALUE!r}")
    _check_size(len(text.data), bounds.max_json_bytes)

    def walk(node: Any, depth: int) -> Any:
        if isinstance(node, float):
            return _finite(node)
        if isinstance(node, list):
            _check_depth(depth, bounds)
            return [walk(item, depth + 1) for item in node]
        if isinstance(node, dict):
            _check_depth(depth, bounds)
            if "$tensor" in node:
                return take(node)
            return {_unescaped(key): walk(item, depth + 1) for key, item in node.items()}
        return node

    def take(node: dict[str, Any]) -> Any:
        name, kind = node["$tensor"], node.get("as", "")
        if len(node) != 2 or kind not in get_args(Kind) or not isinstance(name, str):
            raise _invalid("a place for a tensor is malformed")
        # Used once each: or a few bytes of JSON could ask for a thousand copies.
        tensor = tensors.pop(name, None)
        if tensor is None:
            raise _invalid(f"the tensor {name!r} is missing, or used twice")
        return from_raw(kind, tensor)

    value = walk(_parse(text.data), 0)
    if tensors:
        raise _invalid(f"the tensor {next(iter(tensors))!r} has no place in the value")
    return value


def read_safetensors(
    data: bytes | memoryview,
    bounds: Bounds = DEFAULT_BOUNDS,
    *,
    metadata: Mapping[str, str] | None = METADATA,
) -> dict[str, RawTensor]:
    """Return the tensors of a safetensors file by name; they are views of ``data``.

    Args:
        data: The file.
        bounds: What it may have.
        metadata: What its header must say; ``None``: anything.

    Raises:
        PayloadInvalid: The bytes are not such a file.
        PayloadTooLarge: It is over a bound.
    """
    view = memoryview(data).cast("B")
    _check_size(len(view), bounds.max_bytes)
    body = 8 + int.from_bytes(view[:8], "little")
    if len(view) < 8 or body > len(view):
        raise _invalid("it ends before its header does")
    _check_size(body - 8, bounds.max_header_bytes)
    header = _parse(view[8:body])
    if not isinstance(header, dict):
        raise _invalid("its header is not an object")
    said = header.pop("__metadata__", None)
    if metadata is not None and said != metadata:
        raise _invalid(f"its header does not say {metadata}")
    if len(header) > bounds.max_tensors + 1:
        raise _invalid(f"it has {len(header) - 1} tensors, over the {bounds.max_tensors} allowed")
    spans = sorted((*_read_entry(entry), name) for name, entry in header.items())
    tensors, at = {}, 0
    for begin, end, dtype, shape, name in spans:
        if begin != at or not begin <= end <= len(view) - body:
            raise _invalid(f"the bytes of tensor {name!r} do not follow those before it")
        tensors[name] = RawTensor(dtype, shape, view[body + begin : body + end])
        at = end
    if at != len(view) - body:
        raise _invalid("it has bytes that belong to no tensor")
    return tensors


def _read_entry(entry: Any) -> tuple[int, int, str, tuple[int, ...]]:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
            if len(entry) == 3 and all(type(size) is int for size in shape):
                return begin, end, dtype, tuple(shape)
    raise _invalid("the description of a tensor is malformed")


def _parse(text: bytes | memoryview) -> Any:
    try:
        return json.loads(
            str(text, "utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
        raise _invalid(f"its JSON cannot be read ({error})") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    named = dict(pairs)
    if len(named) != len(pairs):
        raise ValueError("an object has a key twice")
    return named


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _unescaped(key: str) -> str:
    if not key.startswith("$"):
        return key
    if not key.startswith("$$"):
        raise _invalid(f"the key {key[:32]!r} is not known")
    return key[1:]


def _finite(number: float) -> float:
    if not math.isfinite(number):
        raise PayloadInvalid(
            what=f"The number {number}", reason="JSON has none that is not finite; send an array"
        )
    return number


def _check_depth(depth: int, bounds: Bounds) -> None:
    if depth >= bounds.max_depth:
        raise _invalid(f"it is nested in more than {bounds.max_depth} levels")


def _check_size(size_bytes: int, cap_bytes: int) -> None:
    if size_bytes > cap_bytes:
        raise PayloadTooLarge(
            size_bytes=size_bytes, cap_bytes=cap_bytes, remedy="send several smaller ones"
        )


def _invalid(reason: str) -> PayloadInvalid:
    return PayloadInvalid(what="A payload", reason=reason)
