"""Tensor parallelism by torch alone: columns and rows, by transformers' own plan of each family.

Layers that the plan names keep some of their outputs (``colwise``) or inputs (``rowwise``); the
group adds up what the latter give. All else is whole on every rank. Embeddings and logits are
divided by the vocabulary. Heads go whole to ranks: see ``layout.Heads``.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fabric.engine.partition.checkpoint import Cut
from fabric.engine.partition.groups import Groups
from fabric.engine.partition.layout import Heads, Place, share
from fabric.engine.partition.partitioner import Part, Parts
from fabric.errors import ModelNotLoadable

_WHOLE = ("replicated_with_grad_allreduce", "replicated")
"""Styles of the plan that leave a module as it is."""

_VOCABULARY = ("embedding_rowwise",)
"""The style of embeddings, which are divided in every family."""

_OWN_PLANS = {
    "gpt2": {
        "h.*.attn.c_attn": "colwise",
        "h.*.attn.c_proj": "rowwise",
        "h.*.mlp.c_fc": "colwise",
        "h.*.mlp.c_proj": "rowwise",
    }
}
"""Of families for which transformers has none."""


class SummedParts(nn.Module):  # type: ignore[misc]
    """A module whose outputs the group adds up."""

    def __init__(self, inner: nn.Module, groups: Groups) -> None:
        super().__init__()
        self.inner = inner
        self._groups = groups

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return what the undivided module would."""
        return self._groups.sum(self.inner(*inputs))


class VocabularyPart(nn.Module):  # type: ignore[misc]
    """An embedding of some of the tokens; the group adds up to all of them."""

    def __init__(self, inner: nn.Embedding, rows: range, groups: Groups) -> None:
        super().__init__()
        self.inner = inner
        self._rows = rows
        self._groups = groups

    @property
    def weight(self) -> Tensor:
        """The rows that are here, [rows, hidden size]."""
        weight: Tensor = self.inner.weight
        return weight

    def forward(self, ids_1N: Tensor) -> Tensor:
        """Return the tokens' vectors, [1, N, hidden size]."""
        foreign = (ids_1N < self._rows.start) | (ids_1N >= self._rows.stop)
        own = torch.where(foreign, 0, ids_1N - self._rows.start)
        return self._groups.sum(self.inner(own).masked_fill(foreign[..., None], 0))


class TorchPartitioner:
    """A ``Partitioner`` over torch's collectives, on any device."""

    divides_logits = True

    def divide(self, model: PreTrainedModel, groups: Groups, *, name: str) -> Parts:
        """See ``Partitioner.divide``."""
        plan = _plan_of(model, name=name)
        base = model.base_model
        prefix = "" if base is model else f"{model.base_model_prefix}."
        return _Division(model, groups, name=name).run(
            {
                re.compile(re.escape(f"{prefix}{p}").replace(r"\*", r"\d+")): s
                for p, s in plan.items()
            }
        )

    def complete(self, model: PreTrainedModel, groups: Groups) -> None:
        """See ``Partitioner.complete``: nothing is left to do."""


class _Division:
    def __init__(self, model: PreTrainedModel, groups: Groups, *, name: str) -> None:
        self._model = model
        self._groups = groups
        self._place: Place = groups.place
        self._name = name
        self._parts: Parts = {}
        self._tensors = {path for path, _ in model.named_parameters()}
        config = model.config
        num_query = config.num_attention_heads
        self._num_heads = num_query, getattr(config, "num_key_value_heads", None) or num_query

    def run(self, plan: dict[re.Pattern[str], str]) -> Parts:
        styles: dict[str, Callable[[str], None]] = {
            "colwise": self._divide_outputs,
            "rowwise": self._divide_inputs,
            "packed_colwise": self._divide_packed,
            "moe_tp_experts": self._sum_experts,
        }
        modules = [path for path, _ in self._model.named_modules()]
        # Experts are wrapped last: their tensors are found by the path they had.
        found = [
            (path, style)
            for path in (*modules, *self._tensors)
            for p, style in plan.items()
            if p.fullmatch(path)
        ]
        for path, style in sorted(found, key=lambda entry: entry[1] == "moe_tp_experts"):
            styles[style](path)
        for module in self._model.modules():
            if hasattr(module, "head_dim") and hasattr(module, "layer_idx"):
                self._tell_heads(module)
        self._divide_vocabulary()
        return self._parts

    def _heads(self) -> Heads:
        num_query, num_key_value = self._num_heads
        return Heads.of(
            self._place, num_query=num_query, num_key_value=num_key_value, name=self._name
        )

    def _outputs_of(self, path: str, width: int) -> tuple[range, ...]:
        """Return a rank's outputs of a layer: whole heads of attention, or columns."""
        attention, _, layer = path.rpartition(".")
        owner = self._model.get_submodule(attention)
        if not hasattr(owner, "head_dim"):
            return (self._place.width(width),)
        heads, size = self._heads(), owner.head_dim
        num_query, num_key_value = self._num_heads
        query = range(heads.query.start * size, heads.query.stop * size)
        key_value = range(heads.key_value.start * size, heads.key_value.stop * size)
        if layer == "q_proj" and width == num_query * size:
            return (query,)
        if layer in ("k_proj", "v_proj") and width == num_key_value * size:
            return (key_value,)
        if layer == "c_attn" and width == 3 * num_query * size:
            third = width // 3
            return tuple(range(query.start + i * third, query.stop + i * third) for i in range(3))
        raise ModelNotLoadable(
            model=self._name,
            reason=f"how its {path} goes by heads is not known; use pipeline_parallel instead of"
            " tensor_parallel",
        )

    def _divide_outputs(self, path: str) -> None:
        layer = self._model.get_submodule(path)
        num_inputs, num_outputs = _size_of(layer)
        ranges = self._outputs_of(path, num_outputs)
        local = _like(layer, num_inputs, sum(map(len, ranges)), biased=layer.bias is not None)
        self._model.set_submodule(path, local)
        dim = 1 if isinstance(layer, Conv1D) else 0
        self._put(f"{path}.weight", local, "weight", Cut(dim=dim, ranges=ranges))
        if layer.bias is not None:
            self._put(f"{path}.bias", local, "bias", Cut(dim=0, ranges=ranges))

    def _divide_inputs(self, path: str) -> None:
        if path in self._tensors:
            self._divide_parameter(path, 2)
            return
        layer = self._model.get_submodule(path)
        num_inputs, num_outputs = _size_of(layer)
        owner = self._model.get_submodule(path.rpartition(".")[0])
        if hasattr(owner, "head_dim"):
            query = self._heads().query
            inputs = range(query.start * owner.head_dim, query.stop * owner.head_dim)
        else:
            inputs = self._place.width(num_inputs)
        # The sum shall have the bias once.
        adds_bias = layer.bias is not None and self._place.tensor_rank == 0
        local = _like(layer, len(inputs), num_outputs, biased=adds_bias)
        self._model.set_submodule(path, SummedParts(local, self._groups))
        dim = 0 if isinstance(layer, Conv1D) else 1
        self._put(f"{path}.weight", local, "weight", Cut(dim=dim, ranges=(inputs,)))
        if adds_bias:
            self._put(f"{path}.bias", local, "bias", None)
        elif layer.bias is not None:
            self._parts[f"{path}.bias"] = None

    def _divide_packed(self, path: str) -> None:
        half = self._model.get_parameter(path).shape[1] // 2
        own = self._place.width(half)
        both = (own, range(own.start + half, own.stop + half))
        self._divide_parameter(path, 1, both)

    def _divide_parameter(self, path: str, dim: int, ranges: tuple[range, ...] = ()) -> None:
        """Divide a tensor of all experts."""
        owner_path, _, attribute = path.rpartition(".")
        owner = self._model.get_submodule(owner_path)
        whole = self._model.get_parameter(path)
        cut = Cut(dim=dim, ranges=ranges or (self._place.width(whole.shape[dim]),))
        shape = list(whole.shape)
        shape[dim] = cut.size
        setattr(owner, attribute, nn.Parameter(whole.new_empty(shape), requires_grad=False))
        self._put(path, owner, attribute, cut)

    def _sum_experts(self, path: str) -> None:
        experts = self._model.get_submodule(path)
        for attribute, value in list(experts.named_parameters(recurse=False)):
            if f"{path}.{attribute}" not in self._parts:
                self._put(f"{path}.{attribute}", experts, attribute, None)
            if hasattr(experts, "intermediate_dim") and attribute == "down_proj":
                experts.intermediate_dim = value.shape[2]
        self._model.set_submodule(path, SummedParts(experts, self._groups))

    def _tell_heads(self, attention: nn.Module) -> None:
        """Let an attention module know how many heads are here."""
        heads = self._heads()
        local = {
            "num_heads": len(heads.query),
            "num_key_value_heads": len(heads.key_value),
            "num_key_value_groups": len(heads.query) // len(heads.key_value),
            "split_size": len(heads.query) * attention.head_dim,
        }
        for attribute, value in local.items():
            if hasattr(attention, attribute):
                setattr(attention, attribute, value)

    def _divide_vocabulary(self) -> None:
        model, tensor, rank = self._model, self._place.layout.tensor, self._place.tensor_rank
        tables = {id(m): path for path, m in model.named_modules()}
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        rows = share(embedding.weight.shape[0], tensor, rank)
        cut = Cut(dim=0, ranges=(rows,))
        weight = nn.Parameter(embedding.weight.new_empty(len(rows), embedding.weight.shape[1]))
        tied = head.weight is embedding.weight
        for table in (embedding, head):
            path = tables[id(table)]
            table.weight = (
                weight if tied else nn.Parameter(weight.new_empty(len(rows), table.weight.shape[1]))
            )
            self._put(f"{path}.weight", table, "weight", cut)
            if getattr(table, "bias", None) is not None:
                table.bias = nn.Parameter(table.bias.new_empty(len(rows)))
                self._put(f"{path}.bias", table, "bias", cut)
        embedding.padding_idx = None
        embedding.num_embeddings = head.out_features = len(rows)
        model.set_submodule(tables[id(embedding)], VocabularyPart(embedding, rows, self._groups))

    def _put(self, name: str, module: nn.Module, attribute: str, cut: Cut | None) -> None:
        self._parts[name] = Part(module=module, attribute=attribute, cut=cut)


def _plan_of(model: PreTrainedModel, *, name: str) -> dict[str, str]:
    config = model.config
    plan = config.base_model_tp_plan or _OWN_PLANS.get(config.model_type)
    known = {"colwise", "rowwise", "packed_colwise", "moe_tp_experts", *_WHOLE, *_VOCABULARY}
    unknown = sorted(set((plan or {}).values()) - known)
    if plan is None or unknown:
        what = f"it divides by {', '.join(unknown)}" if unknown else "there is no plan for it"
        raise ModelNotLoadable(
            model=name,
            reason=f"the tensors of {config.model_type} cannot be divided among ranks here"
            f" ({what}); use pipeline_parallel instead of tensor_parallel",
        )
    return {
        pattern: style for pattern, style in plan.items() if style not in (*_WHOLE, *_VOCABULARY)
    }


def _size_of(layer: nn.Module) -> tuple[int, int]:
    """Return a layer's inputs and outputs."""
    num_inputs, num_outputs = layer.weight.shape
    return (num_inputs, num_outputs) if isinstance(layer, Conv1D) else (num_outputs, num_inputs)


def _like(layer: nn.Module, num_inputs: int, num_outputs: int, *, biased: bool) -> nn.Module:
    """Return a layer of the same kind and another size."""
    dtype = layer.weight.dtype
    if isinstance(layer, Conv1D):
        with torch.device("meta"):
            made = Conv1D(num_outputs, num_inputs).to(dtype)
        if not biased:  # it always adds one
            made.bias = nn.Parameter(torch.zeros(num_outputs, dtype=dtype), requires_grad=False)
        return made
    return nn.Linear(num_inputs, num_outputs, bias=biased, dtype=dtype, device="meta")
