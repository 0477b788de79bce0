"""The device that a model is on: the CPU, or a GPU that torch reaches by CUDA."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fabric.engine.config import CACHE_BYTES, EngineConfig
from fabric.errors import SettingInvalid

CPU = torch.device("cpu")

_USED = 0.92
"""The part of a GPU's memory that an engine takes; the rest is for what others allocate late."""


def choose_device(config: EngineConfig) -> torch.device:
    """Return where a model runs; if it is divided, where its first rank does.

    Raises:
        SettingInvalid: A GPU is asked for and torch sees none, or for what GPUs are not used for.
    """
    asked = config.device
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    if asked == "cpu":
        if config.attention == "flex":
            raise _refusal("attention", "flex", "it is for GPUs; leave it out on a CPU")
        return CPU
    if not torch.cuda.is_available():
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        reason = (
            f"torch {torch.__version__} ({build}) sees no GPU; ask the scheduler for one, install a"
            " build of torch for its driver, or set device: cpu"
        )
        raise _refusal("device", asked, reason)
    if config.batch_invariant:
        reason = "the kernels of GPUs sum in an order that depends on the batch; leave it out"
        raise _refusal("batch_invariant", True, reason)
    return torch.device("cuda", torch.cuda.current_device())


def choose_gpu(index: int, num_ranks: int) -> torch.device:
    """Return the GPU of one of a node's ranks: each takes another, in their order.

    Args:
        index: Of the rank on its node.
        num_ranks: On the node.

    Raises:
        SettingInvalid: There are fewer GPUs than ranks.
    """
    num_gpus = torch.cuda.device_count()
    if num_gpus < num_ranks:
        reason = (
            f"a node with {num_ranks} ranks of the model shows them {num_gpus} GPUs, and each rank"
            " needs one of its own; ask the scheduler for more, start fewer ranks on a node"
            " (local_ranks), or set device: cpu"
        )
        raise _refusal("device", "cuda", reason)
    return torch.device("cuda", index)


def uses_flex(config: EngineConfig, device: torch.device) -> bool:
    """Say whether rows find their keys by flex attention."""
    return device.type != "cpu" and config.attention != "gathered"


def _refusal(setting: str, value: object, reason: str) -> SettingInvalid:
    return SettingInvalid(setting=f"engine.{setting}", value=value, reason=reason)


def put(
    values: Sequence[object] | NDArray[np.generic],
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return numbers as a tensor on a device."""
    return torch.tensor(values, dtype=dtype).to(device)


def describe(device: torch.device) -> str:
    """Return what replies name beside the versions: nothing of a CPU, a GPU's model."""
    return "" if device.type == "cpu" else f" on {torch.cuda.get_device_name(device)}"


def choose_cache_bytes(
    config: EngineConfig, device: torch.device, run_largest: Callable[[], object]
) -> int:
    """Return the memory of the KV cache: as configured, else what is usual or is left.

    Args:
        config: Of the engine.
        device: Where the model's weights are already.
        run_largest: Runs the largest step without a cache, so that its memory is seen.
    """
    if config.cache_bytes is not None:
        return config.cache_bytes
    if device.type == "cpu":
        return CACHE_BYTES
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    run_largest()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    current = torch.cuda.memory_allocated(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return get_spare_bytes(free=free, total=total, working=peak - current)


def get_spare_bytes(*, free: int, total: int, working: int) -> int:
    """Return what a cache may take of a GPU's memory.

    Args:
        free: Bytes that nobody has, the weights being there.
        total: Bytes of the GPU.
        working: Bytes that the largest step needs beside the weights.
    """
    return max(0, free - working - int(total * (1.0 - _USED)))
