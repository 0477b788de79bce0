"""How fast a split could be at best: memory, arithmetic and links at their peaks.

A stage's step takes at least the longer of reading what it needs and multiplying it, and then its
links' time, because the next matrix waits for the sum. Latencies of kernels and links are left
out, so a real engine is slower, most of all at small batches.
"""

from __future__ import annotations

from dataclasses import dataclass

from fabric.planning.memory import cache_bytes
from fabric.planning.model_shape import ModelShape
from fabric.planning.split import Machine, Split
from fabric.planning.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTime:
    """The least seconds one stage takes for one step, by what it waits for."""

    memory_s: float
    compute_s: float
    link_s: float

    @property
    def total_s(self) -> float:
        """The stage's step."""
        return max(self.memory_s, self.compute_s) + self.link_s

    @property
    def limit(self) -> str:
        """What most of it is spent on."""
        times = {"memory": self.memory_s, "compute": self.compute_s, "links": self.link_s}
        return max(times, key=lambda name: times[name])


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What one copy of the model cannot exceed, all rows at their full context.

    Args:
        decode_tokens_s: Tokens a second, all rows together.
        decode_tokens_s_row: Tokens a second of one row.
        decode_limit: What the slowest stage's decoding waits for: memory, compute or links.
        decode_idle: The part of the time a stage has nothing to decode (pipeline bubbles).
        prefill_tokens_s: Prompt tokens a second, with prompts enough to keep all stages busy.
        prefill_limit: As ``decode_limit``.
        first_token_s: Seconds until the first token of a prompt as long as the context, alone.
        prefill_idle: The part of that time a stage has nothing to do.
    """

    decode_tokens_s: float
    decode_tokens_s_row: float
    decode_limit: str
    decode_idle: float
    prefill_tokens_s: float
    prefill_limit: str
    first_token_s: float
    prefill_idle: float


def get_bounds(shape: ModelShape, work: Workload, split: Split, machine: Machine) -> Bounds:
    """Return the bounds of one copy of the model.

    The rows are dealt to as many groups as there are stages, each group in another stage; a stage
    reads its weights once for every group.
    """
    num_stages = split.pipeline
    group = -(-work.batch // num_stages)
    num_groups = -(-work.batch // group)
    decodes = [_decode_time(shape, work, split, machine, s, group) for s in range(num_stages)]
    slowest = max(decodes, key=lambda time: time.total_s)
    # With a group for every stage the slowest one sets the pace; else a row waits for them all.
    round_s = max(sum(time.total_s for time in decodes), num_groups * slowest.total_s)
    prefills = [_prefill_time(shape, work, split, machine, s) for s in range(num_stages)]
    hardest = max(prefills, key=lambda time: time.total_s)
    num_chunks = -(-work.context_tokens // work.step_tokens)
    # One prompt fills the stages chunk by chunk; the slowest stage sees every chunk.
    others_s = sum(time.total_s for time in prefills) - hardest.total_s
    first_token_s = hardest.total_s + others_s / num_chunks
    return Bounds(
        decode_tokens_s=work.batch / round_s,
        decode_tokens_s_row=1 / round_s,
        decode_limit=slowest.limit,
        decode_idle=1 - num_groups * sum(t.total_s for t in decodes) / (num_stages * round_s),
        prefill_tokens_s=work.context_tokens / hardest.total_s,
        prefill_limit=hardest.limit,
        first_token_s=first_token_s,
        prefill_idle=1 - sum(t.total_s for t in prefills) / (num_stages * first_token_s),
    )


def _decode_time(
    shape: ModelShape, work: Workload, split: Split, machine: Machine, stage: int, num_rows: int
) -> StageTime:
    """One token for each of some rows; weights, touched experts and the rows' cache are read."""
    layers = [shape.layers[index] for index in split.stages[stage]]
    scores = sum(layer.score_values for layer in layers) * work.context_tokens
    cache = sum(cache_bytes(layer, work, split.tensor) for layer in layers)
    return _stage_time(
        *(shape, work, split, machine, stage),
        num_tokens=num_rows,
        num_logits=num_rows,
        scores=scores * num_rows,
        cache_read_bytes=cache * num_rows * work.context_tokens,
    )


def _prefill_time(
    shape: ModelShape, work: Workload, split: Split, machine: Machine, stage: int
) -> StageTime:
    """A whole prompt: every token attends to itself and all before it; logits of the last only."""
    layers = [shape.layers[index] for index in split.stages[stage]]
    pairs = work.context_tokens * (work.context_tokens + 1) // 2
    return _stage_time(
        *(shape, work, split, machine, stage),
        num_tokens=work.context_tokens,
        num_logits=1,
        scores=sum(layer.score_values for layer in layers) * pairs,
        cache_read_bytes=0,
    )


def _stage_time(
    shape: ModelShape,
    work: Workload,
    split: Split,
    machine: Machine,
    stage: int,
    *,
    num_tokens: int,
    num_logits: int,
    scores: int,
    cache_read_bytes: int,
) -> StageTime:
    layers = [shape.layers[index] for index in split.stages[stage]]
    precision, device, tensor = work.precision, machine.device, split.tensor
    is_last = stage == split.pipeline - 1
    head = shape.embedding if is_last else 0
    touched = sum(layer.touched_experts(num_tokens) * layer.expert for layer in layers)
    divided = sum(layer.divided for layer in layers) + touched
    whole = sum(layer.whole for layer in layers)
    matrices_bytes = (divided / tensor + whole) * precision.matrix_bits / 8
    small = sum(layer.small for layer in layers) + (shape.final_small if is_last else 0)
    values = small + head / tensor
    read_bytes = matrices_bytes + values * precision.value_bytes + cache_read_bytes
    active = sum(layer.active_matrices for layer in layers)
    multiply_adds = active * num_tokens + head * num_logits + scores
    sent_bytes = num_tokens * shape.hidden * precision.value_bytes
    return StageTime(
        memory_s=read_bytes / device.memory_bytes_s,
        compute_s=2 * multiply_adds / tensor / device.flops[precision.multiplied_as],
        link_s=_link_s(split, machine, stage, len(layers), sent_bytes),
    )


def _link_s(split: Split, machine: Machine, stage: int, num_layers: int, sent_bytes: int) -> float:
    """Two all-reduces a layer inside the group, and one hand-over to the next stage.

    Source: a ring all-reduce sends 2 (t - 1) / t of the data over every link (Patarasuk and Yuan,
    2009).
    """
    device, tensor = machine.device, split.tensor
    seconds = 2 * num_layers * 2 * (tensor - 1) / tensor * sent_bytes / device.link_bytes_s
    if stage < split.pipeline - 1:
        here, there = (machine.node_of(s, tensor) for s in (stage, stage + 1))
        rate = device.link_bytes_s if here == there else device.network_bytes_s
        seconds += sent_bytes / rate
    return seconds
