"""What one rank has to hold."""

from __future__ import annotations

from dataclasses import dataclass

from fabric.planning.model_shape import LayerShape, ModelShape
from fabric.planning.workload import Workload

RESERVE_FRACTION = 0.1
"""Of a device's memory, left to the framework: its context, communication buffers, fragments.

Source: vLLM's ``gpu_memory_utilization``, 0.9 by default for years.
"""

_LIVE_STREAMS = 3
"""The residual stream, its normed copy and a layer's output are alive together."""

_LOGIT_BYTES = 4
"""Logits are sampled in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """The bytes of one rank.

    Args:
        stage: Its pipeline stage.
        tensor_rank: Its place in the stage's tensor group.
        first_layer: The first layer it works on.
        num_layers: How many it works on.
        owned_parameters: Parameters counted here; over all ranks they sum to the model's.
        copied_parameters: Parameters that another rank owns and this one holds as well.
        weight_bytes: Of both.
        cache_bytes: Of the KV cache, for all rows at their full length.
        activation_bytes: Of a step under the token budget.
        reserve_bytes: Left to the framework.
    """

    stage: int
    tensor_rank: int
    first_layer: int
    num_layers: int
    owned_parameters: int
    copied_parameters: int
    weight_bytes: int
    cache_bytes: int
    activation_bytes: int
    reserve_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.weight_bytes + self.cache_bytes + self.activation_bytes + self.reserve_bytes


def share(total: int, parts: int, index: int) -> int:
    """Return part ``index`` of a total that is divided as evenly as whole numbers allow."""
    return total // parts + (index < total % parts)


def rank_memory(
    shape: ModelShape,
    work: Workload,
    layers: range,
    *,
    tensor: int,
    tensor_rank: int,
    stage: int,
    device_bytes: int,
) -> RankMemory:
    """Return what a rank holds that works on some layers.

    Args:
        shape: The model.
        work: What it is asked to hold.
        layers: The stage's layers.
        tensor: Ranks that divide the stage's matrices.
        tensor_rank: Which of them this is.
        stage: The stage's place in the pipeline.
        device_bytes: The device's memory.
    """
    mine = [shape.layers[index] for index in layers]
    is_first, is_last = layers.start == 0, layers.stop == len(shape.layers)
    own_matrices = sum((layer.divided + layer.experts) // tensor for layer in mine)
    rows = share(shape.vocabulary, tensor, tensor_rank) * shape.hidden
    own_values = copied_values = 0
    if is_first:
        own_values += rows
    if is_last and not shape.is_tied:
        own_values += rows
    elif is_last and not is_first:
        copied_values += rows
    # What is not divided is owned by the group's first rank; the others hold copies.
    common_matrices = sum(layer.whole for layer in mine)
    common_values = sum(layer.small for layer in mine)
    common_values += shape.positions * is_first + shape.final_small * is_last
    common = common_matrices + common_values
    owner = tensor_rank == 0
    return RankMemory(
        stage=stage,
        tensor_rank=tensor_rank,
        first_layer=layers.start,
        num_layers=len(layers),
        owned_parameters=own_matrices + own_values + (common if owner else 0),
        copied_parameters=copied_values + (0 if owner else common),
        weight_bytes=work.precision.weight_bytes(
            matrices=own_matrices + common_matrices,
            values=own_values + copied_values + common_values,
        ),
        cache_bytes=sum(cache_bytes(layer, work, tensor) for layer in mine) * work.cache_tokens,
        activation_bytes=activation_bytes(shape, work, mine, tensor=tensor, is_last=is_last),
        reserve_bytes=int(device_bytes * RESERVE_FRACTION),
    )


def cache_bytes(layer: LayerShape, work: Workload, tensor: int) -> int:
    """Return what a rank's cache takes for one token of one layer."""
    values = layer.cache_values // tensor if layer.cache_divided else layer.cache_values
    return values * work.precision.value_bytes


def activation_bytes(
    shape: ModelShape, work: Workload, layers: list[LayerShape], *, tensor: int, is_last: bool
) -> int:
    """Return what the widest moment of a full step takes.

    A step has at most ``step_tokens`` tokens of prompts and one of every row. Attention is taken
    to be computed in tiles, so that no matrix of scores exists.
    """
    num_tokens = work.step_tokens + work.batch
    width = max(layer.width for layer in layers) // tensor
    streams = num_tokens * (_LIVE_STREAMS * shape.hidden + width) * work.precision.value_bytes
    return streams + (work.batch * shape.vocabulary * _LOGIT_BYTES if is_last else 0)
