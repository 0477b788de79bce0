"""Steps in which rows only decode, with fixed buffers: a GPU replays their kernels as one graph.

A step of few rows is bound by telling the GPU its kernels one by one. Its rows run in the smallest
bucket that holds them; the places left over decode into a scratch block that nobody reads.

Shapes: B rows of a bucket, M cache blocks of the longest row, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fabric.engine.attention import Chunk, Scoring, get_slots, get_table
from fabric.engine.cache import BLOCK_TOKENS, KvCache
from fabric.engine.device import put
from fabric.engine.flex import PagedRows

Replay = Callable[[], Tensor]
"""Runs a step over its buffers as they are now, and returns its logits [B, V]."""

Capture = Callable[[Replay], Replay]
"""Runs a step a few times and returns what runs it again."""

RunModel = Callable[..., Tensor]
"""``runner.run_model``, for one model."""


class GraphedDecode:
    """The decoding steps of one model, captured once for each bucket.

    Args:
        model: On the cache's device.
        run_model: Runs it over ids, positions and wanted places, with an attention.
        cache: Of its keys and values.
        scratch: A block that no row is given.
        max_rows: The largest bucket.
        num_blocks: The most cache blocks of a row.
        capture: What captures a step.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        run_model: RunModel,
        cache: KvCache,
        *,
        scratch: int,
        max_rows: int,
        num_blocks: int,
        capture: Capture,
    ) -> None:
        self._capture = capture
        self._buckets = {
            size: _Bucket(
                functools.partial(run_model, model),
                cache,
                num_rows=size,
                num_blocks=num_blocks,
                scratch=scratch,
            )
            for size in _sizes(max_rows)
        }
        self._replays: dict[int, Replay] = {}

    def start(self) -> None:
        """Capture every bucket, the largest first: the others run in its memory.

        Raises:
            RuntimeError: The model waits for the GPU inside a step, or cannot be captured.
        """
        for size in sorted(self._buckets, reverse=True):
            bucket = self._buckets[size]
            bucket.fill(())
            self._replays[size] = self._capture(bucket.step)

    def takes(self, chunks: Sequence[Chunk]) -> bool:
        """Say whether a step is one of these: every row decodes, and nothing changes a layer."""
        return 0 < len(chunks) <= max(self._replays, default=0) and all(
            len(chunk.tokens) == chunk.num_wanted == 1 and not chunk.deltas for chunk in chunks
        )

    def run(self, chunks: Sequence[Chunk]) -> Tensor:
        """Return the logits of the chunks' tokens in their order, [W, V] in float32."""
        size = min(size for size in self._replays if size >= len(chunks))
        self._buckets[size].fill(chunks)
        # The next step of this bucket writes to the same memory.
        return self._replays[size]()[: len(chunks)].clone()


class _Bucket:
    """The buffers of steps of so many rows."""

    def __init__(
        self, run_model: RunModel, cache: KvCache, *, num_rows: int, num_blocks: int, scratch: int
    ) -> None:
        device = cache.device
        self._run_model = run_model
        self._cache = cache
        self._num_rows = num_rows
        self._unused = Chunk(tokens=(0,), start=0, blocks=(scratch,), num_wanted=1)
        self._ids_1B, self._positions_1B, self._slots_1B = (
            torch.zeros(1, num_rows, dtype=torch.long, device=device) for _ in range(3)
        )
        self._tables_BM = torch.zeros(num_rows, num_blocks, dtype=torch.long, device=device)
        self._wanted_B = torch.arange(num_rows, device=device)

    def fill(self, chunks: Sequence[Chunk]) -> None:
        """Put the rows of a step in the buffers."""
        rows = [*chunks, *[self._unused] * (self._num_rows - len(chunks))]
        width = max(row.start for row in rows) // BLOCK_TOKENS + 1
        values: Sequence[tuple[Tensor, Sequence[object]]] = (
            (self._ids_1B[0], [row.tokens[0] for row in rows]),
            (self._positions_1B[0], [row.start for row in rows]),
            (self._slots_1B[0], [slot for row in rows for slot in get_slots(row)]),
            # What is behind a row's own blocks may be anything.
            (self._tables_BM[:, :width], [get_table(row, width) for row in rows]),
        )
        for buffer, numbers in values:
            buffer.copy_(put(numbers, self._cache.device))

    def step(self) -> Tensor:
        """Run the model over the buffers; return its logits [B, V] in float32."""
        rows = PagedRows(
            self._cache, self._tables_BM, self._positions_1B[0], num_tokens=1, fixed=True
        )

        def attend(
            layer: int,
            q: Tensor,
            k: Tensor,
            v: Tensor,
            scale: float | None,
            options: Mapping[str, object],
        ) -> Tensor:
            self._cache.write(layer, self._slots_1B[0], k, v)
            return rows.attend(layer, q, Scoring.of(scale, options, q.shape[2]))

        return self._run_model(self._ids_1B, self._positions_1B, self._wanted_B, attend)


def _sizes(max_rows: int) -> list[int]:
    """Return the powers of two below the most rows, and these."""
    return sorted({*(1 << i for i in range(max_rows.bit_length())), max_rows})


class CudaCapture:
    """Captures steps as CUDA graphs, which share their memory: no two run at once.

    Source: torch's notes on CUDA graphs (warm up on a side stream, one pool for several graphs).
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Replay) -> Replay:
        """Return what replays the step.

        Raises:
            RuntimeError: The step waits for the GPU, or does what a graph cannot hold.
        """
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()  # kernels are compiled, libraries take their memory
            with _no_waiting():
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits_BV = step()

        def replay() -> Tensor:
            graph.replay()
            return logits_BV

        return replay


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Raise where the CPU waits for the GPU: a capture that meets that cannot go on."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
