"""Tensors as bytes, whichever library they come from.

numpy and torch are not needed to carry tensors: where the library that a tensor is for is not
there, or has no such type (numpy has no bfloat16), it is a ``RawTensor``.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fabric.errors import PayloadInvalid

if TYPE_CHECKING:
    import numpy as np
    import torch

Kind = Literal["bytes", "numpy", "raw", "torch"]
"""What a tensor was before it was written, and is again after it was read."""

MAX_DIMS = 16
MAX_ELEMENTS = 2**40
"""Bound of the product of the sizes that are not zero: more overflows in the libraries."""

# The names of safetensors' types -> bytes an element, numpy's type (little-endian), torch's.
# Source: https://github.com/huggingface/safetensors, safetensors/src/tensor.rs.
_DTYPES = {
    "BOOL": (1, "|b1", "bool"),
    "U8": (1, "|u1", "uint8"),
    "I8": (1, "|i1", "int8"),
    "F8_E4M3": (1, None, "float8_e4m3fn"),
    "F8_E5M2": (1, None, "float8_e5m2"),
    "U16": (2, "<u2", "uint16"),
    "I16": (2, "<i2", "int16"),
    "F16": (2, "<f2", "float16"),
    "BF16": (2, None, "bfloat16"),
    "U32": (4, "<u4", "uint32"),
    "I32": (4, "<i4", "int32"),
    "F32": (4, "<f4", "float32"),
    "C64": (8, "<c8", "complex64"),
    "U64": (8, "<u8", "uint64"),
    "I64": (8, "<i8", "int64"),
    "F64": (8, "<f8", "float64"),
}
_FROM_NUMPY = {names[1]: dtype for dtype, names in _DTYPES.items() if names[1]}
_FROM_TORCH = {f"torch.{names[2]}": dtype for dtype, names in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class RawTensor:
    """A tensor as safetensors stores it.

    Args:
        dtype: safetensors' name of the type, such as ``BF16``.
        shape: The sizes; ``()`` is a scalar.
        data: The elements, little-endian, last dimension fastest.

    Raises:
        PayloadInvalid: The type is not known, or the sizes are not those of the data.
    """

    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise _refused(self.dtype, f"its type is none of {', '.join(_DTYPES)}")
        if len(self.shape) > MAX_DIMS or not all(
            type(size) is int and 0 <= size <= MAX_ELEMENTS for size in self.shape
        ):
            raise _refused(
                self.dtype, f"its shape is not of at most {MAX_DIMS} sizes up to {MAX_ELEMENTS}"
            )
        if math.prod(size or 1 for size in self.shape) > MAX_ELEMENTS:
            raise _refused(self.dtype, f"it has more than {MAX_ELEMENTS} elements")
        needed = math.prod(self.shape) * self.item_bytes
        if len(self.data) != needed:
            raise _refused(
                self.dtype,
                f"its shape {list(self.shape)} takes {needed} bytes and it has {len(self.data)}",
            )
        if self.dtype == "BOOL" and bytes(self.data).translate(None, b"\0\1"):
            raise _refused(self.dtype, "a truth value is neither 0 nor 1")

    @property
    def item_bytes(self) -> int:
        """The bytes of one element."""
        return _DTYPES[self.dtype][0]


def to_raw(value: object) -> tuple[Kind, RawTensor]:
    """Return what a value is and its tensor; data is copied only where it is not contiguous.

    Raises:
        PayloadInvalid: The value is no tensor, or one that safetensors cannot hold.
    """
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    if isinstance(value, RawTensor):
        return "raw", value
    if isinstance(value, bytes | bytearray | memoryview):
        data = memoryview(value).cast("B")
        return "bytes", RawTensor("U8", (len(data),), data)
    if torch is not None and isinstance(value, torch.Tensor):
        return "torch", _from_torch(value, torch)
    # Other subclasses mean more than their elements: a masked array has its mask.
    if numpy is not None and (
        type(value) in (numpy.ndarray, numpy.memmap) or isinstance(value, numpy.generic)
    ):
        return "numpy", _from_numpy(numpy.asarray(value, order="C"))
    raise PayloadInvalid(
        what=f"A value of type {type(value).__qualname__}",
        reason="payloads are JSON, bytes, numpy arrays and torch tensors",
    )


def from_raw(kind: Kind, tensor: RawTensor) -> Any:
    """Return the value ``to_raw`` was given, with data of its own.

    Raises:
        PayloadInvalid: ``bytes`` are not bytes.
    """
    if kind == "bytes":
        if tensor.dtype != "U8" or len(tensor.shape) != 1:
            raise _refused(tensor.dtype, "it is said to be bytes and is not")
        return bytes(tensor.data)
    _, numpy_name, torch_name = _DTYPES[tensor.dtype]
    if kind == "torch" and (torch := sys.modules.get("torch")):
        dtype = getattr(torch, torch_name)
        if not len(tensor.data):
            return torch.empty(tensor.shape, dtype=dtype)
        return torch.frombuffer(bytearray(tensor.data), dtype=dtype).reshape(tensor.shape)
    if kind != "raw" and numpy_name and importlib.util.find_spec("numpy"):
        import numpy

        return numpy.frombuffer(tensor.data, numpy_name).reshape(tensor.shape).copy()
    return RawTensor(tensor.dtype, tensor.shape, bytes(tensor.data))


def _from_numpy(array: np.ndarray[Any, Any]) -> RawTensor:
    little = array.dtype.newbyteorder("<")
    dtype = _FROM_NUMPY.get(little.str)
    if dtype is None:
        raise _refused(str(array.dtype), f"its type is none of {', '.join(_FROM_NUMPY.values())}")
    flat = array.astype(little, copy=False).reshape(-1)
    return RawTensor(dtype, array.shape, flat.view("u1").data)


def _from_torch(tensor: torch.Tensor, torch: Any) -> RawTensor:
    dtype = _FROM_TORCH.get(str(tensor.dtype))
    if dtype is None or tensor.layout != torch.strided:
        raise _refused(
            f"{tensor.dtype}, {tensor.layout}",
            f"it must be dense and of one of the types {', '.join(_FROM_TORCH.values())}",
        )
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    flat = (torch.view_as_real(plain) if plain.is_complex() else plain).reshape(-1)
    return RawTensor(dtype, tuple(tensor.shape), memoryview(flat.view(torch.uint8).numpy()))


def _refused(dtype: str, reason: str) -> PayloadInvalid:
    return PayloadInvalid(what=f"A tensor ({dtype})", reason=reason)
