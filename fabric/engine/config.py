"""How an engine runs. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args, get_type_hints

from fabric.errors import SettingInvalid
from fabric.messages import EngineOptions

CACHE_BYTES = 512 * 2**20
"""The KV cache on a CPU, if nothing else is said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Limits and choices of one engine.

    Args:
        dtype: Of the weights and the KV cache; ``float16`` is for GPUs without bfloat16.
        device: Where the model is: ``cuda`` a GPU, ``auto`` one where torch sees it; of a divided
            model a GPU for each process.
        attention: How rows find their keys: ``auto`` is the kernels' way on a CPU and ``flex`` on a
            GPU, which reads them where they lie; ``gathered`` copies a row's together first.
        graphs: Whether a GPU replays the kernels of a step in which rows only decode.
        weights: ``int8`` keeps those of linear layers in 8 bits with a scale for each output; the
            digest and the dtype that replies name say so.
        num_threads: Threads torch uses for one operation; 0 leaves torch's default.
        cache_bytes: Memory of the KV cache; ``None``: 512 MiB on a CPU, what is left on a GPU.
        max_rows: The most choices that run at once.
        step_tokens: The most tokens in one step: a decoding row takes one, prefill the rest. More
            means a faster prefill and longer pauses for the rows that decode meanwhile.
        slowdown: How many times longer than decoding alone a step with prefill may take for one of
            many rows; twice as long where as many rows wait as decode. Prefill takes what room that
            leaves, but always a little.
        context_tokens: The longest row; ``None``: as long as the model allows.
        batch_invariant: Whether an answer's bits may depend on nothing but the request: not on the
            batch, the cached part of its prompt, or how its prompt was cut. Long prompts take
            longer.
        speculation: Whether several tokens of a row may be verified at once, and who guesses them:
            ``lookup`` in the row's own text, ``model`` by ``draft_model``. Answers stay the same.
        draft_model: Source of a smaller model with the same tokenizer.
        tensor_parallel: Processes that divide every matrix; ``cache_bytes`` is of each process.
        pipeline_parallel: Stages, by layers, that follow each other; each is a tensor group.
        stage_layers: Layers of each stage; ``None``: as even as can be.
        partitioner: What divides matrices: torch's collectives, or DeepSpeed's AutoTP.
        rendezvous: ``HOST:PORT`` by which ranks on other nodes reach this one; ``None``: all ranks
            are here.
        rendezvous_fd: An inherited socket that is bound there already.
        local_ranks: Ranks on this node; ``None``: all.
        rank_timeout_s: How long a rank may be silent before it counts as lost.
        offload: Where weights are that do not fit: ``disk`` leaves the layers' matrices in the
            model's files and reads them at every step; ``host`` keeps them in the memory beside a
            GPU.
        adapter_bytes: Memory of the adapters that are loaded.

    Raises:
        SettingInvalid: A number is out of range.
    """

    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    attention: Literal["auto", "flex", "gathered"] = "auto"
    graphs: bool = True
    weights: Literal["as loaded", "int8"] = "as loaded"
    num_threads: int = 0
    cache_bytes: int | None = None
    max_rows: int = 64
    step_tokens: int = 512
    slowdown: float = 1.8
    context_tokens: int | None = None
    adapter_bytes: int = 256 * 2**20
    batch_invariant: bool = False
    speculation: Literal["off", "lookup", "model"] = "off"
    draft_model: str | None = None
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    stage_layers: tuple[int, ...] | None = None
    partitioner: Literal["torch", "deepspeed"] = "torch"
    rendezvous: str | None = None
    rendezvous_fd: int | None = None
    local_ranks: int | None = None
    rank_timeout_s: float = 60.0
    offload: Literal["none", "host", "disk"] = "none"

    @staticmethod
    def of(options: EngineOptions) -> EngineConfig:
        """Return what a launch's options ask for.

        Raises:
            SettingInvalid: A number is out of range.
        """
        sizes = options.model_dump(exclude_none=True, exclude={"backend", "vllm"})
        return replace(EngineConfig(), **sizes)

    @property
    def num_ranks(self) -> int:
        """Processes that hold the model together."""
        return self.tensor_parallel * self.pipeline_parallel

    def __post_init__(self) -> None:
        for setting, least in (
            *(("num_threads", 0), ("cache_bytes", 1), ("max_rows", 1), ("adapter_bytes", 0)),
        ):
            if (value := getattr(self, setting)) is not None and value < least:
                self._refuse(setting, f"it must be at least {least}")
        for setting in ("tensor_parallel", "pipeline_parallel"):
            if getattr(self, setting) < 1:
                self._refuse(setting, "it must be at least 1")
        if self.local_ranks is not None and not 1 <= self.local_ranks <= self.num_ranks:
            self._refuse("local_ranks", f"it must be from 1 to the {self.num_ranks} ranks")
        if self.local_ranks not in (None, self.num_ranks) and self.rendezvous is None:
            self._refuse("rendezvous", "ranks on other nodes need HOST:PORT of this one")
        if self.stage_layers is not None and (
            len(self.stage_layers) != self.pipeline_parallel or min(self.stage_layers) < 1
        ):
            self._refuse("stage_layers", "it must have one number of layers for each stage")
        if not self.rank_timeout_s > 0:
            self._refuse("rank_timeout_s", "it must be over 0")
        if self.step_tokens <= self.max_rows:
            self._refuse("step_tokens", "it must be over max_rows, or prefill could never run")
        if not self.slowdown >= 1.0:
            self._refuse("slowdown", "it must be at least 1")
        if self.context_tokens is not None and self.context_tokens < 1:
            self._refuse("context_tokens", "it must be at least 1")
        if self.num_ranks > 1 or self.offload != "none":
            for setting in ("draft_model", "batch_invariant"):
                if getattr(self, setting):
                    self._refuse(setting, "a model that is divided or offloaded does not take it")
            if self.weights != "as loaded":
                self._refuse("weights", "a model that is divided or offloaded is run as loaded")
        for setting in ("device", "attention", "dtype", "weights", "speculation"):
            if getattr(self, setting) not in get_args(get_type_hints(EngineConfig)[setting]):
                self._refuse(setting, "it must be one of those that the documentation names")
        if (self.speculation == "model") != (self.draft_model is not None):
            self._refuse("draft_model", "it and speculation 'model' go together")

    def _refuse(self, setting: str, reason: str) -> None:
        raise SettingInvalid(
            setting=f"engine.{setting}", value=getattr(self, setting), reason=reason
        )
