"""Loads a draft model beside the one it guesses for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from fabric.engine.cache import LayerShape
from fabric.engine.drafts import ModelDrafter
from fabric.engine.fused import fuse
from fabric.engine.linear import pack_linears
from fabric.engine.model import LoadedModel, load_model
from fabric.engine.probe import observe_layers, reference_logits, verify_runner
from fabric.engine.runner import Runner
from fabric.engine.source import ModelSource
from fabric.errors import ModelNotLoadable


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftModel:
    """A loaded draft model; it has no cache yet."""

    name: str
    model: PreTrainedModel
    layers: Sequence[LayerShape]
    expected: Tensor
    """What ``verify_runner`` compares with."""

    def drafter(self, *, num_blocks: int, step_tokens: int) -> ModelDrafter:
        """Return what guesses with it, over as many cache blocks as the rows have.

        Raises:
            ModelNotLoadable: Its attention is not one we can compute.
        """
        runner = Runner(self.model, self.layers, num_blocks=num_blocks)
        verify_runner(runner, self.expected, name=self.name)
        return ModelDrafter(runner, step_tokens=step_tokens)


def load_draft_model(
    source: str, target: LoadedModel, *, dtype: str, context_tokens: int
) -> DraftModel:
    """Load a model that guesses for ``target`` in rows of at most ``context_tokens``.

    Raises:
        ModelNotLoadable: It cannot be read or served, or its tokens are not the target's.
    """
    device = target.model.device
    loaded = load_model(ModelSource.parse(source), name=source, dtype=dtype, device=device)
    if loaded.tokenizer.get_vocab() != target.tokenizer.get_vocab():
        raise ModelNotLoadable(
            model=source, reason="its tokens are not those of the model it drafts"
        )
    if loaded.vocabulary > target.vocabulary:
        raise ModelNotLoadable(
            model=source,
            reason=f"it embeds {loaded.vocabulary} tokens, the model it drafts only"
            f" {target.vocabulary}",
        )
    if loaded.context_tokens is not None and loaded.context_tokens < context_tokens:
        raise ModelNotLoadable(
            model=source,
            reason=f"its context of {loaded.context_tokens} tokens is shorter than the"
            f" {context_tokens} of the model it drafts; set context_tokens",
        )
    model = loaded.model
    layers = observe_layers(model, name=source)
    expected = reference_logits(model)
    pack_linears(model)
    fuse(model)
    return DraftModel(name=source, model=model, layers=layers, expected=expected)
