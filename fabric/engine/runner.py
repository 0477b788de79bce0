"""Runs unmodified transformers modules over the chunks of one step.

All tokens of a step lie in one ragged row ``[1, N, hidden]``; only attention has to know which
token belongs to whom, and attention is ours, registered through transformers' interface. So any
family that uses the interface can be served, and every PyTorch hook works.

Shapes: N tokens of the step, W tokens whose logits are wanted, V vocabulary, H query heads,
K key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from fabric.engine.attention import Chunk, Scoring, StepAttention
from fabric.engine.cache import KvCache, LayerShape
from fabric.engine.device import put
from fabric.engine.flex import FlexAttention
from fabric.engine.graphs import Capture, GraphedDecode
from fabric.engine.layers import WholeLayers
from fabric.engine.lowrank import LayerSize, LowRankLayers, Span
from fabric.engine.touches import Touches

if TYPE_CHECKING:
    from fabric.engine.programs.points import Points

__all__ = [
    "ATTENTION",
    "Attend",
    "Chunk",
    "Runner",
    "StepHooks",
    "run_model",
    "run_ragged",
    "use_our_attention",
]

ATTENTION = "fabric"
"""The name of our attention in transformers' registries."""

Attend = Callable[[int, Tensor, Tensor, Tensor, "float | None", Mapping[str, object]], Tensor]
"""(layer, q_NHD, k_NKD, v_NKD, scale, options of the module) -> out_NHD."""


class StepHooks(Protocol):
    """What acts inside a forward pass."""

    def hooked(self) -> AbstractContextManager[None]:
        """Run the model inside this; it may end before there are logits, if nobody wants any."""

    def around(self, attend: Attend) -> Attend:
        """Return the attention that the model shall call."""

    def attended(self) -> Collection[int]:
        """Return the layers in whose attention it acts."""

    def touches(self) -> Mapping[int, Touches]:
        """Return what it wants done inside layers that run whole."""

    def beside(self, whole: Collection[int]) -> AbstractContextManager[None]:
        """Run the model inside this, too: it does itself what ``touches`` says of layers but these,
        which run whole."""


_attend: ContextVar[Attend] = ContextVar("fabric_attend")


class Runner:
    """One model over one KV cache.

    Args:
        model: Set to our attention (``use_our_attention``).
        layers: The shape of each layer's keys and values.
        num_blocks: Cache blocks that can be given out.
        linears: The layers that chunks' deltas can change; see ``LowRankLayers``.
        invariant: Whether a token's bits may not depend on its chunk.
        first_layer: The one that ``layers`` begin with.
        attention: What finds the keys of a step's tokens in the cache.
        scratch: Whether there is one more block, after all those, that no row is given.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[LayerShape],
        *,
        num_blocks: int,
        linears: Mapping[str, LayerSize] = MappingProxyType({}),
        invariant: bool = False,
        first_layer: int = 0,
        attention: type[StepAttention | FlexAttention] = StepAttention,
        scratch: bool = False,
    ) -> None:
        self._first_layer = first_layer
        self._attention = attention
        self.graphs: GraphedDecode | None = None
        """What runs steps in which rows only decode, if it has been started."""
        self.model = model
        self.lowrank = LowRankLayers(model, linears)
        self._invariant = invariant
        self.num_blocks = num_blocks
        self.points: Points | None = None
        """Where programs may act, if they may."""
        self.cache = KvCache(
            layers, num_blocks=num_blocks + scratch, dtype=model.dtype, device=model.device
        )
        self._whole = WholeLayers(
            model, self.cache, linears=self.lowrank.indices, first_layer=first_layer
        )

    def forward(self, chunks: Sequence[Chunk], programs: StepHooks | None = None) -> Tensor:
        """Run one step.

        Args:
            chunks: At least one, of different rows; single-token ones first for speed.
            programs: What acts inside it.

        Returns:
            The wanted logits in the chunks' order, [W, V] in float32.
        """
        if programs is None and self.graphs is not None and self.graphs.takes(chunks):
            return self.graphs.run(chunks)
        return self._forward(chunks, programs)

    def _forward(self, chunks: Sequence[Chunk], programs: StepHooks | None) -> Tensor:
        """Run a step by the model's modules, where hooks see it."""
        attention = self._attention(chunks, self.cache, invariant=self._invariant)

        def attend(
            layer: int,
            q_NHD: Tensor,
            k_NKD: Tensor,
            v_NKD: Tensor,
            scale: float | None,
            options: Mapping[str, object],
        ) -> Tensor:
            scoring = Scoring.of(scale, options, q_NHD.shape[2])
            self._whole.learn(layer, scoring)
            return attention(layer - self._first_layer, q_NHD, k_NKD, v_NKD, scoring)

        def whole(
            but: Collection[int] = (), touches: Mapping[int, Touches] = MappingProxyType({})
        ) -> AbstractContextManager[Collection[int]]:
            if not isinstance(attention, StepAttention):
                return nullcontext(())
            return self._whole.applied(attention, but=but, touches=touches, changes=changes)

        with self.lowrank.applied(_spans(chunks)) as changes:
            if programs is None:
                with whole():
                    return run_ragged(self.model, chunks, attend)
            logits_WV: Tensor | None = None
            seen, touches = programs.attended(), programs.touches()
            # Hooked first: a layer runs whole only where nobody looks inside.
            with (
                programs.hooked(),
                whole(seen, touches) as layers,
                programs.beside(layers),
            ):
                logits_WV = run_ragged(self.model, chunks, programs.around(attend))
            # The programs may have ended the pass before there were any.
            return torch.zeros(0, 1) if logits_WV is None else logits_WV

    def graph_decoding(self, *, max_rows: int, num_blocks: int, capture: Capture) -> None:
        """Let steps in which rows only decode run from fixed buffers from now on.

        Args:
            max_rows: The most rows of such a step.
            num_blocks: The most cache blocks of a row.
            capture: What captures a step.

        Raises:
            RuntimeError: The model cannot be captured; it runs as before.
        """
        graphs = GraphedDecode(
            self.model,
            run_model,
            self.cache,
            scratch=self.num_blocks + 1,
            max_rows=max_rows,
            num_blocks=num_blocks,
            capture=capture,
        )
        graphs.start()
        self.graphs = graphs

    def forward_hidden(
        self, chunks: Sequence[Chunk], programs: StepHooks | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run one step; return its logits as ``forward`` does, and all tokens' last hidden states
        in the chunks' order, [N, hidden] in float32."""
        seen: list[Tensor] = []

        def keep(_module: torch.nn.Module, _inputs: object, output: Sequence[Tensor]) -> None:
            seen.append(output[0][0])

        hook = self.model.base_model.register_forward_hook(keep)
        try:
            logits_WV = self._forward(chunks, programs)
        finally:
            hook.remove()
        return logits_WV, seen[0].float()


def run_ragged(
    model: PreTrainedModel, chunks: Sequence[Chunk], attend: Attend, *, grad: bool = False
) -> Tensor:
    """Run the model over the chunks' tokens with this attention; return logits [W, V], float32.

    With ``grad`` it remembers what gradients need.
    """
    ids: list[int] = []
    positions: list[int] = []
    wanted: list[int] = []
    for chunk in chunks:
        ids.extend(chunk.tokens)
        positions.extend(range(chunk.start, chunk.start + len(chunk.tokens)))
        wanted.extend(range(len(ids) - chunk.num_wanted, len(ids)))
    device = model.device
    return run_model(
        model,
        put([ids], device),
        put([positions], device),
        put(wanted, device, torch.long),
        attend,
        grad=grad,
    )


def run_model(
    model: PreTrainedModel,
    ids_1N: Tensor,
    positions_1N: Tensor,
    wanted_W: Tensor,
    attend: Attend,
    *,
    grad: bool = False,
) -> Tensor:
    """Run the model over tokens that are on its device; see ``run_ragged``."""
    # A context variable, because the registered function is one for all engines of the process.
    token = _attend.set(attend)
    try:
        with torch.enable_grad() if grad else torch.inference_mode():
            output = model(
                input_ids=ids_1N,
                position_ids=positions_1N,
                use_cache=False,
                logits_to_keep=wanted_W,
            )
    finally:
        _attend.reset(token)
    logits: Tensor = output.logits[0].float()
    return logits


def _spans(chunks: Sequence[Chunk]) -> list[Span]:
    """Return which of the step's tokens are changed, and how."""
    spans, start = [], 0
    for chunk in chunks:
        stop = start + len(chunk.tokens)
        spans += [Span(start=start, stop=stop, delta=delta) for delta in chunk.deltas]
        start = stop
    return spans


def use_our_attention(model: PreTrainedModel) -> None:
    """Let the model call the attention that ``run_ragged`` is given."""
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, _no_mask)
    model.set_attn_implementation(ATTENTION)


def _no_mask(*_: object, **__: object) -> None:
    return None


def _attention(
    module: torch.nn.Module,
    query_1HND: Tensor,
    key_1KND: Tensor,
    value_1KND: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001
    scaling: float | None = None,
    dropout: float = 0.0,  # noqa: ARG001
    **options: object,
) -> tuple[Tensor, None]:
    layer: int = module.layer_idx
    q, k, v = (x[0].transpose(0, 1) for x in (query_1HND, key_1KND, value_1KND))
    return _attend.get()(layer, q, k, v, scaling, options)[None], None
