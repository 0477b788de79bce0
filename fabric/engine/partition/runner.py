"""A ``Runner`` over part of a model, and the one of rank 0, which lets all others run too.

Shapes: N tokens of the step, W tokens whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedModel

from fabric.engine.attention import Chunk, StepAttention
from fabric.engine.cache import KvCache, LayerShape
from fabric.engine.flex import FlexAttention
from fabric.engine.partition.groups import Groups
from fabric.engine.partition.orders import Order, write_chunks
from fabric.engine.runner import Runner, StepHooks
from fabric.errors import RankLost


class Leader(Protocol):
    """What gives orders to the other ranks."""

    def tell(self, order: Order, numbers: Sequence[int] = ()) -> None:
        """Give an order to all.

        Raises:
            RankLost: One of them is gone.
        """

    def together(self) -> AbstractContextManager[None]:
        """Return a block in which ranks exchange tensors.

        Raises:
            RankLost: On leaving the block, for whatever it raised: the ranks are out of step.
        """


class PartRunner(Runner):
    """A ``Runner`` of one rank. All ranks run a step together; rank 0 gets what it computes.

    Args:
        model: The rank's part.
        layers: Of the rank's layers.
        num_blocks: Cache blocks that can be given out.
        groups: The rank's exchanges.
        vocabulary: Logits of a token.
        divided: Whether each rank of the last stage computes part of them.
        attention: What finds the keys of a step's tokens in the cache.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[LayerShape],
        *,
        num_blocks: int,
        groups: Groups,
        vocabulary: int,
        divided: bool,
        attention: type[StepAttention | FlexAttention] = StepAttention,
    ) -> None:
        super().__init__(
            model,
            layers,
            num_blocks=num_blocks,
            first_layer=groups.place.layers.start,
            attention=attention,
        )
        self._groups = groups
        self._vocabulary = vocabulary
        self._divided = divided

    def _forward(self, chunks: Sequence[Chunk], programs: StepHooks | None) -> Tensor:
        """See ``Runner``; the logits are right at rank 0. There are no programs here."""
        assert programs is None
        return self.collect(super()._forward(chunks, programs))

    def collect(self, logits_WV: Tensor) -> Tensor:
        """Return, at rank 0, whole logits [W, V] in float32."""
        return self._groups.collect(logits_WV, vocabulary=self._vocabulary, divided=self._divided)

    def forward_hidden(
        self, chunks: Sequence[Chunk], programs: StepHooks | None = None
    ) -> tuple[Tensor, Tensor]:
        """See ``Runner.forward_hidden``; what is returned is right at rank 0."""
        assert programs is None
        logits_WV, hidden_NH = super().forward_hidden(chunks)
        return logits_WV, self._groups.fetch_hidden(hidden_NH)


class LeadingRunner(Runner):
    """The ``Runner`` of rank 0: every step, and every change of the cache, happens on all ranks.

    Args:
        part: Rank 0's own.
        leader: Gives orders to the others.
    """

    def __init__(self, part: PartRunner, leader: Leader) -> None:
        self.model = part.model
        self.lowrank = part.lowrank
        self.points = None
        self.num_blocks = part.num_blocks
        self.cache = LeadingCache(part.cache, leader)
        self._part = part
        self._leader = leader

    def forward(self, chunks: Sequence[Chunk], programs: StepHooks | None = None) -> Tensor:
        """See ``Runner.forward``."""
        assert programs is None
        self._leader.tell(Order.STEP, write_chunks(chunks))
        with self._leader.together():
            return self._part.forward(chunks)

    def forward_hidden(
        self, chunks: Sequence[Chunk], programs: StepHooks | None = None
    ) -> tuple[Tensor, Tensor]:
        """See ``Runner.forward_hidden``."""
        assert programs is None
        self._leader.tell(Order.STEP_HIDDEN, write_chunks(chunks))
        with self._leader.together():
            return self._part.forward_hidden(chunks)


class LeadingCache(KvCache):
    """Rank 0's cache, whose blocks are changed on all ranks."""

    def __init__(self, own: KvCache, leader: Leader) -> None:
        self.device = own.device
        self._own = own
        self._leader = leader

    def copy_block(self, source: int, target: int) -> None:
        """Copy one block in all layers."""
        self._leader.tell(Order.COPY, (source, target))
        self._own.copy_block(source, target)

    def wipe(self, blocks: Sequence[int]) -> None:
        """Zero blocks; with a rank lost nothing, for no step will read them."""
        with suppress(RankLost):
            self._leader.tell(Order.WIPE, blocks)
            self._own.wipe(blocks)
