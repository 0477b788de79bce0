"""The CPU kernels, compiled once for a user, a processor and a compiler.

Shapes: M rows, K inputs, N outputs, B decoding rows, H query heads, D head size; of low-rank
changes N tokens, O outputs, R rank.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.resources
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from logging import getLogger
from pathlib import Path

import platformdirs
import torch
from torch import Tensor

_logger = getLogger(__name__)

_FLAGS = (
    *("-O3", "-march=native", "-fopenmp", "-fPIC", "-shared"),
    # Sums may be reordered; NaN must stay NaN, because a row that has one ends with an error.
    *("-ffast-math", "-fno-finite-math-only"),
    # Without these files loading the kernels does not turn the process's small numbers into zeros.
    "-nostartfiles",
    *(("-mprefer-vector-width=512",) if platform.machine() == "x86_64" else ()),
)
_COMPILE_S = 60.0
PANEL = 32
"""Outputs that lie together in a packed weight; what ``native.c`` calls PANEL."""

_NAMES = {torch.bfloat16: "bf16", torch.float32: "f32"}
_POINTER, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
_PACK = [_POINTER, _LONG, _LONG, _POINTER]
_LINEAR = [_POINTER, _LONG, _LONG, _LONG, _POINTER, _POINTER, _POINTER, _LONG, _POINTER]


class Native:
    """Typed calls of the compiled library. Tensors are on the CPU, their last dimension dense."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._packs, self._linears, self._norms = {}, {}, {}
        self._gates, self._rotations, self._attends = {}, {}, {}
        self._adds, self._layers = {}, {}
        self._multiplied: set[torch.dtype] = set()
        self._attend_chunk = _declare(
            library.attend_chunk,
            [_POINTER, _LONG, _LONG, *[_POINTER] * 3, *[_LONG] * 6, _FLOAT, _LONG, _FLOAT,
             _POINTER],
            ctypes.c_int,
        )  # fmt: skip
        self._packs[torch.int8] = _declare(library.pack_linear_i8, _PACK)
        self._linears[torch.int8] = _declare(library.linear_i8, _LINEAR)
        for dtype, name in _NAMES.items():
            self._packs[dtype] = _declare(getattr(library, f"pack_linear_{name}"), _PACK)
            self._linears[dtype] = _declare(
                getattr(library, f"linear_{name}"),
                _LINEAR,
            )
            if getattr(library, f"has_linear_{name}")():
                self._multiplied.add(dtype)
            self._gates[dtype] = _declare(
                getattr(library, f"gate_{name}"),
                [_POINTER, _LONG, _LONG, _LONG, _FLOAT, _FLOAT, _POINTER],
            )
            self._norms[dtype] = _declare(
                getattr(library, f"rms_norm_{name}"),
                [_POINTER, _LONG, _POINTER, _FLOAT, _LONG, _LONG, _POINTER],
            )
            self._rotations[dtype] = _declare(
                getattr(library, f"rotate_{name}"),
                [*[_POINTER, _LONG, _LONG], *[_POINTER] * 2, *[_LONG] * 3, _POINTER],
            )
            self._attends[dtype] = _declare(
                getattr(library, f"attend_{name}"),
                [*[_POINTER, _LONG, _LONG], *[_POINTER] * 3, _LONG, _POINTER, *[_LONG] * 5,
                 _FLOAT, _LONG, _FLOAT, _POINTER],
                ctypes.c_int,
            )  # fmt: skip
            self._adds[dtype] = _declare(
                getattr(library, f"add_lowrank_{name}"),
                [_POINTER, _LONG, _POINTER, *[_LONG] * 3, *[_POINTER] * 2, _LONG],
                ctypes.c_int,
            )
            self._layers[dtype] = _declare(
                getattr(library, f"layer_{name}"), [_POINTER] * 7, ctypes.c_int
            )

    def multiplies(self, dtype: torch.dtype) -> bool:
        """Say whether ``linear`` takes this dtype: bfloat16 needs the processor's AVX512-BF16."""
        return dtype in self._multiplied

    def takes(self, x: Tensor) -> bool:
        """Say whether the kernels can read ``x``."""
        return x.dtype in _NAMES and x.device.type == "cpu" and x.stride(-1) == 1

    def pack(self, weight_NK: Tensor) -> Tensor:
        """Return a weight in the order ``linear`` reads it; but in float32 K must be even."""
        num_outputs, num_inputs = weight_NK.shape
        size = -(-num_outputs // PANEL) * PANEL * num_inputs
        packed = torch.empty(size, dtype=weight_NK.dtype)
        weight_NK = weight_NK.contiguous()
        self._packs[weight_NK.dtype](
            weight_NK.data_ptr(), num_outputs, num_inputs, packed.data_ptr()
        )
        return packed

    def linear(
        self,
        x_MK: Tensor,
        packed: Tensor,
        bias: Tensor | None,
        num_outputs: int,
        scales: Tensor | None = None,
    ) -> Tensor:
        """Return ``x`` times a packed weight plus a bias, [M, N] in its dtype.

        A row's result has the same bits whatever the other rows are.

        Args:
            x_MK: In the weight's dtype; in bfloat16 where that is int8.
            packed: As ``pack`` gives it.
            bias: [N] in the dtype of ``x``.
            num_outputs: N.
            scales: Of an int8 weight's outputs, float32, filled up to whole panels of 32.
        """
        num_rows, num_inputs = x_MK.shape
        y_MN = torch.empty(num_rows, num_outputs, dtype=x_MK.dtype)
        self._linears[packed.dtype](
            x_MK.data_ptr(), x_MK.stride(0), num_rows, num_inputs, packed.data_ptr(),
            None if scales is None else scales.data_ptr(),
            None if bias is None else bias.data_ptr(), num_outputs, y_MN.data_ptr(),
        )  # fmt: skip
        return y_MN

    def rms_norm(self, x_MK: Tensor, weight_K: Tensor, eps: float) -> Tensor:
        """Return ``weight`` times ``x`` over its root mean square, [M, K] in the dtype of ``x``."""
        num_rows, size = x_MK.shape
        y_MK = torch.empty(num_rows, size, dtype=x_MK.dtype)
        self._norms[x_MK.dtype](
            x_MK.data_ptr(), x_MK.stride(0), weight_K.data_ptr(), eps, num_rows, size,
            y_MK.data_ptr(),
        )  # fmt: skip
        return y_MK

    def gate(self, x_MK: Tensor, a: float, b: float) -> Tensor:
        """Return ``x`` times the logistic function of ``a x + b x³``, [M, K] in its dtype."""
        num_rows, size = x_MK.shape
        y_MK = torch.empty(num_rows, size, dtype=x_MK.dtype)
        self._gates[x_MK.dtype](
            x_MK.data_ptr(), x_MK.stride(0), num_rows, size, a, b, y_MK.data_ptr()
        )
        return y_MK

    def rotate(self, x_MHD: Tensor, cosine_MD: Tensor, sine_MD: Tensor) -> Tensor:
        """Return ``x`` turned by its rotary positions, [M, H, D] and contiguous."""
        rows, heads, size = x_MHD.shape
        y_MHD = torch.empty(rows, heads, size, dtype=x_MHD.dtype)
        self._rotations[x_MHD.dtype](
            x_MHD.data_ptr(), x_MHD.stride(0), x_MHD.stride(1), cosine_MD.data_ptr(),
            sine_MD.data_ptr(), rows, heads, size, y_MHD.data_ptr(),
        )  # fmt: skip
        return y_MHD

    def attend(
        self,
        q_BHD: Tensor,
        keys: Tensor,
        values: Tensor,
        tables: Tensor,
        lengths_B: Tensor,
        *,
        scale: float,
        window: int,
        cap: float,
    ) -> Tensor:
        """Return the attention of one token a row over the cache, [B, H, value size].

        Args:
            q_BHD: The queries.
            keys: The pool of one layer, [tokens, key-value heads, D].
            values: The pool of one layer, [tokens, key-value heads, value size].
            tables: Cache blocks of every row, int64 [B, most blocks].
            lengths_B: Tokens of every row, its own included, int64.
            scale: Of the scores.
            window: Tokens that a query sees, counted back from itself; 0: all.
            cap: Of the scores, by tanh; 0: none.

        Raises:
            MemoryError: The scores of a row find no memory.
        """
        num_rows, num_heads, size = q_BHD.shape
        value_size = values.shape[2]
        out = torch.empty(num_rows, num_heads, value_size, dtype=q_BHD.dtype)
        failed = self._attends[q_BHD.dtype](
            q_BHD.data_ptr(), q_BHD.stride(0), q_BHD.stride(1), keys.data_ptr(), values.data_ptr(),
            tables.data_ptr(), tables.shape[1], lengths_B.data_ptr(), num_rows, num_heads,
            keys.shape[1], size, value_size, scale, window, cap, out.data_ptr(),
        )  # fmt: skip
        if failed:
            raise MemoryError("no memory for the scores of a decoding row")
        return out

    def attends_chunks(self, q_nHD: Tensor) -> bool:
        """Say whether ``attend_chunk`` takes these queries: bfloat16, where it is multiplied."""
        even = q_nHD.shape[2] % 2 == 0
        return self.takes(q_nHD) and q_nHD.dtype == torch.bfloat16 in self._multiplied and even

    def attend_chunk(
        self,
        q_nHD: Tensor,
        keys: Tensor,
        values: Tensor,
        table: Tensor,
        start: int,
        *,
        scale: float,
        window: int,
        cap: float,
    ) -> Tensor:
        """Return the attention of consecutive tokens of one row, [n, H, value size].

        A token's result has the same bits whatever tokens of its row are computed beside it.

        Args:
            q_nHD: The queries; ``attends_chunks`` says whether they can be taken.
            keys: As for ``attend``; the chunk's own are in it.
            values: As for ``attend``.
            table: The row's cache blocks, int64.
            start: Position of the first token.
            scale: As for ``attend``.
            window: As for ``attend``.
            cap: As for ``attend``.

        Raises:
            MemoryError: The row's keys or scores find no memory.
        """
        num_tokens, num_heads, size = q_nHD.shape
        value_size = values.shape[2]
        out = torch.empty(num_tokens, num_heads, value_size, dtype=q_nHD.dtype)
        failed = self._attend_chunk(
            q_nHD.data_ptr(), q_nHD.stride(0), q_nHD.stride(1), keys.data_ptr(), values.data_ptr(),
            table.data_ptr(), start, num_tokens, num_heads, keys.shape[1], size, value_size, scale,
            window, cap, out.data_ptr(),
        )  # fmt: skip
        if failed:
            raise MemoryError("no memory for the scores of a chunk")
        return out

    def add_lowrank(
        self, x_NK: Tensor, y_NO: Tensor, tokens: int, factors: int, num_tokens: int
    ) -> None:
        """Add ``(x down^T) up`` to the outputs of some tokens, each with factors of its own.

        Args:
            x_NK: The inputs of all tokens; as ``y``, it may have dimensions of size 1 before N.
            y_NO: Their outputs, changed in place.
            tokens: The address of which tokens, each once, int64 [num_tokens].
            factors: The address of int64 [num_tokens, 3]: for each of them the address of ``down``
                [R, K], that of ``up`` [R, O], and R, which may be 0. Both are dense and of the
                dtype of ``x``.
            num_tokens: How many.

        Raises:
            MemoryError: The sums of a token find no memory.
        """
        failed = self._adds[x_NK.dtype](
            x_NK.data_ptr(), x_NK.stride(-2), y_NO.data_ptr(), y_NO.stride(-2), x_NK.shape[-1],
            y_NO.shape[-1], tokens, factors, num_tokens,
        )  # fmt: skip
        if failed:
            raise MemoryError("no memory for the sums of a changed token")

    def run_layer(
        self,
        layer: ctypes.Structure,
        step: ctypes.Structure,
        touches: int | None,
        x_1NE: Tensor,
        cosine: Tensor,
        sine: Tensor,
    ) -> Tensor:
        """Return a whole decoder layer's output, in the shape and dtype of ``x``.

        Args:
            layer: ``Layer`` of ``layer.c``.
            step: ``Step`` of ``layer.c``.
            touches: The address of a list of its ``Touch``; ``None``: nothing is touched.
            x_1NE: The hidden states, dense; changed where something is added to them.
            cosine: Of the tokens' positions, dense, [N, D] in the dtype of ``x``.
            sine: The same.

        Raises:
            MemoryError: The scores of a row find no memory.
        """
        y_1NE = torch.empty_like(x_1NE)
        failed = self._layers[x_1NE.dtype](
            ctypes.addressof(layer), ctypes.addressof(step), touches, x_1NE.data_ptr(),
            cosine.data_ptr(), sine.data_ptr(), y_1NE.data_ptr(),
        )  # fmt: skip
        if failed:
            raise MemoryError("no memory for the scores of a step")
        return y_1NE


_loading = threading.Lock()


def load_native() -> Native | None:
    """Compile and load the kernels, once a process; ``None`` where that is not possible."""
    with _loading:
        return _load()


@functools.cache
def _load() -> Native | None:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        _logger.warning("no C compiler: decoding runs on torch's kernels, which are slower")
        return None
    source = read_source()
    kept = _kept(source, Path(compiler))
    if kept.is_file():
        try:
            return Native(ctypes.CDLL(str(kept)))
        except (OSError, AttributeError) as error:
            _logger.warning("kept kernels are damaged", extra={"reason": str(error)})
    try:
        return Native(_compile(compiler, source, kept))
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error).encode()
        _logger.warning("the CPU kernels do not compile", extra={"reason": reason[-2000:].decode()})
        return None


def read_source() -> bytes:
    """Return what is compiled: the parts, then the layers made of them."""
    folder = importlib.resources.files("fabric.engine")
    return b"".join((folder / name).read_bytes() for name in ("native.c", "layer.c"))


def _compile(compiler: str, source: bytes, kept: Path) -> ctypes.CDLL:
    """Compile and load the kernels, and keep them if this user has a place for it."""
    try:
        kept.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        _logger.info("no directory to keep the kernels in", extra={"path": str(kept.parent)})
    place = kept.parent if os.access(kept.parent, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="compiling-", dir=place) as folder:
        target = Path(folder) / kept.name
        command = [compiler, *_FLAGS, "-o", str(target), "-x", "c", "-", "-lm"]
        subprocess.run(command, input=source, check=True, capture_output=True, timeout=_COMPILE_S)
        library = ctypes.CDLL(str(target))
        if place is not None:
            target.replace(kept)  # whole or not at all: other processes may be looking
    return library


def _kept(source: bytes, compiler: Path) -> Path:
    """Return where this user keeps the kernels, compiled for this processor from this source."""
    made_by = compiler.resolve().stat()
    parts = (source, " ".join(_FLAGS), _processor(), made_by.st_size, made_by.st_mtime_ns)
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()
    return platformdirs.user_cache_path("fabric") / "kernels" / f"native-{digest}.so"


def _processor() -> str:
    """Describe the processor: a directory may be shared by machines that differ in it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "model name"))}))


def _declare(function: object, arguments: Sequence[object], result: object = None):  # type: ignore[no-untyped-def]
    function.argtypes, function.restype = arguments, result  # type: ignore[attr-defined]
    return function
