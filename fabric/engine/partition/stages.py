"""Pipeline stages by layer ranges: a model of which only some layers are there.

The modules run as ever, over all layers; those of other stages are replaced. The slot before a
stage's first layer takes over the hidden states of the stage before, the slot after its last one
passes them on. So transformers' code, whatever a family does around its layers, stays in charge.

Shapes: N tokens of the step, H hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fabric.engine.partition.groups import Groups
from fabric.errors import ModelNotLoadable


class Passage(nn.Module):  # type: ignore[misc]
    """In the place of a layer that is elsewhere, or of what follows the last."""

    def forward(self, hidden_1NH: Tensor, *_: object, **__: object) -> Tensor:
        """Return what was given."""
        return hidden_1NH


class Entry(nn.Module):  # type: ignore[misc]
    """The stage's way in."""

    def __init__(self, groups: Groups) -> None:
        super().__init__()
        self._groups = groups

    def forward(self, hidden_1NH: Tensor, *_: object, **__: object) -> Tensor:
        """Return the hidden states of the stage before, [1, N, H]."""
        return self._groups.take_over(hidden_1NH)


class Exit(nn.Module):  # type: ignore[misc]
    """The stage's way out."""

    def __init__(self, groups: Groups) -> None:
        super().__init__()
        self._groups = groups

    def forward(self, hidden_1NH: Tensor, *_: object, **__: object) -> Tensor:
        """Send the hidden states on, and return them."""
        self._groups.pass_on(hidden_1NH)
        return hidden_1NH


class NoEmbedding(nn.Module):  # type: ignore[misc]
    """In the place of an embedding that only the first stage needs."""

    def __init__(self, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        # transformers asks a model's first parameter for its device and dtype.
        self.weight = nn.Parameter(torch.empty(0, hidden_size, dtype=dtype), requires_grad=False)

    def forward(self, ids_1N: Tensor) -> Tensor:
        """Return zeros, [1, N, H]."""
        return self.weight.new_zeros(*ids_1N.shape, self.weight.shape[1])


def keep_stage(model: PreTrainedModel, groups: Groups, *, name: str) -> None:
    """Take out of a model what other stages have.

    Raises:
        ModelNotLoadable: It has no single list of layers.
    """
    place, base = groups.place, model.base_model
    if len(place.layout.stages) == 1:
        return
    lists = [child for child in base.children() if isinstance(child, nn.ModuleList)]
    if len(lists) != 1 or len(lists[0]) != place.layout.num_layers:
        raise ModelNotLoadable(
            model=name,
            reason=f"{type(model).__name__} has no single list of layers to cut into stages; use"
            " tensor_parallel instead of pipeline_parallel",
        )
    (layers,) = lists
    for index in set(range(len(layers))) - set(place.layers):
        layers[index] = Passage()
    if not place.is_first:
        layers[place.layers.start - 1] = Entry(groups)
    if not place.is_last:
        layers[place.layers.stop] = Exit(groups)
    config = model.config.get_text_config()
    for attribute, child in list(base.named_children()):
        if child is layers or not any(True for _ in child.parameters()):
            continue
        if isinstance(child, nn.Embedding) or child is model.get_input_embeddings():
            if not place.is_first:
                setattr(base, attribute, NoEmbedding(config.hidden_size, model.dtype))
        elif not place.is_last:
            setattr(base, attribute, Passage())
    if not place.is_last:
        model.set_output_embeddings(Passage())
