"""How the matrices of a stage are divided among its tensor group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import nn
from transformers import PreTrainedModel

from fabric.engine.partition.checkpoint import Cut
from fabric.engine.partition.groups import Groups


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Where a rank keeps a tensor of the model, and which part of it."""

    module: nn.Module
    attribute: str
    cut: Cut | None


Parts = dict[str, Part | None]
"""By a tensor's name in the undivided model, where it is kept if not there, or in part; ``None`` if
this rank has nothing of it."""


class Partitioner(Protocol):
    """Divides one stage's modules, so that every rank computes with its part."""

    divides_logits: bool
    """Whether each rank's logits are a part of the vocabulary; or else the first rank has all."""

    def divide(self, model: PreTrainedModel, groups: Groups, *, name: str) -> Parts:
        """Change the modules before their weights are read.

        Args:
            model: On the meta device; all its layers, of which the rank may have few.
            groups: The exchanges of this rank.
            name: What errors call the model.

        Returns:
            Where tensors are kept that are divided or moved.

        Raises:
            ModelNotLoadable: It cannot be divided so; says what would.
        """

    def complete(self, model: PreTrainedModel, groups: Groups) -> None:
        """Change the modules after their weights were read.

        Raises:
            PackageMissing: What it works with is not installed.
        """
