"""Weights that do not fit: the matrices of a layer are fetched when it runs, and given up after it.

While one layer computes, a thread fetches the next one, so at most two are where the model is. On a
GPU they are copied on a stream of their own, beside what it computes.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fabric.engine.partition.checkpoint import Cut
from fabric.engine.partition.partitioner import Part


class Source(Protocol):
    """Where matrices are while they are not on the model's device."""

    def read(self, name: str, cut: Cut | None = None) -> Tensor:
        """Return a matrix, or part of it, on the host."""


class HostMemory:
    """Matrices that are read once and stay on the host, in memory that a GPU copies from by itself.

    Args:
        checkpoint: Where they are read.
    """

    def __init__(self, checkpoint: Source) -> None:
        self._checkpoint = checkpoint
        self._kept: dict[tuple[str, Cut | None], Tensor] = {}

    def read(self, name: str, cut: Cut | None = None) -> Tensor:
        """See ``Source``."""
        if (name, cut) not in self._kept:
            self._kept[name, cut] = self._checkpoint.read(name, cut).pin_memory()
        return self._kept[name, cut]


@dataclass(slots=True)
class _Layer:
    module: nn.Module
    parts: dict[str, Part] = field(default_factory=dict)
    absent: dict[str, nn.Parameter] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Fetched:
    """A layer's matrices by their names, and when they will be there, if that is not yet."""

    matrices: dict[str, Tensor]
    copied: torch.cuda.Event | None = None


class Stream:
    """Brings the matrices of layers to the model's device, again and again.

    Args:
        model: Its layers are those of its one list of layers.
        source: Where matrices are read.
        device: Where they go.
    """

    def __init__(self, model: PreTrainedModel, source: Source, device: torch.device) -> None:
        self._source = source
        lists = (child for child in model.base_model.children() if isinstance(child, nn.ModuleList))
        self._layers = [_Layer(module) for layers in lists for module in layers]
        self._owner = {module: layer for layer in self._layers for module in layer.module.modules()}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self._next: tuple[int, Future[_Fetched]] | None = None
        self._device = device
        self._copying = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ended: torch.cuda.Event | None = None
        """When the last layer that was given up has been computed."""

    def take(self, name: str, part: Part) -> bool:
        """Leave a tensor at its source, if it is a matrix of a layer; say whether it is."""
        layer = self._owner.get(part.module)
        tensor = getattr(part.module, part.attribute)
        if layer is None or tensor.dim() < 2:
            return False
        layer.parts[name] = part
        layer.absent[name] = tensor
        return True

    def start(self) -> None:
        """Let every layer that has matrices at the source fetch them when it runs."""
        self._layers = [layer for layer in self._layers if layer.parts]
        for index, layer in enumerate(self._layers):
            layer.module.register_forward_pre_hook(self._fetching(index))
            layer.module.register_forward_hook(self._dropping(index))
            if isinstance(self._source, HostMemory):
                self._read(index)

    @property
    def absent(self) -> set[nn.Parameter]:
        """What stands for the matrices while they are not here."""
        return {tensor for layer in self._layers for tensor in layer.absent.values()}

    def close(self) -> None:
        """Stop reading."""
        self._pool.shutdown(cancel_futures=True)

    def _fetching(self, index: int) -> Callable[..., None]:
        def fetch(*_: object) -> None:
            fetched = self._take_fetched(index)
            following = (index + 1) % len(self._layers)
            self._next = following, self._pool.submit(self._fetch, following, self._ended)
            if fetched.copied is not None:
                computing = torch.cuda.current_stream(self._device)
                computing.wait_event(fetched.copied)
                for matrix in fetched.matrices.values():
                    matrix.record_stream(computing)
            for name, part in self._layers[index].parts.items():
                weight = nn.Parameter(fetched.matrices[name], requires_grad=False)
                setattr(part.module, part.attribute, weight)

        return fetch

    def _dropping(self, index: int) -> Callable[..., None]:
        def drop(*_: object) -> None:
            layer = self._layers[index]
            for name, part in layer.parts.items():
                setattr(part.module, part.attribute, layer.absent[name])
            if self._copying is not None:
                self._ended = torch.cuda.current_stream(self._device).record_event()

        return drop

    def _take_fetched(self, index: int) -> _Fetched:
        """Return a layer's matrices: those that were fetched ahead, if they are its."""
        ahead, self._next = self._next, None
        if ahead is None:
            return self._fetch(index, self._ended)
        fetched = ahead[1].result()
        return fetched if ahead[0] == index else self._fetch(index, self._ended)

    def _fetch(self, index: int, ended: torch.cuda.Event | None) -> _Fetched:
        """Read a layer's matrices and begin to copy them, in the room of the layer that ended."""
        matrices = self._read(index)
        if self._copying is None:
            return _Fetched(matrices)
        if ended is not None:
            # Layers are begun long before the GPU computes them: without this all would be there.
            ended.synchronize()
        with torch.cuda.stream(self._copying):
            pinned = {name: x if x.is_pinned() else x.pin_memory() for name, x in matrices.items()}
            copies = {name: x.to(self._device, non_blocking=True) for name, x in pinned.items()}
            return _Fetched(copies, self._copying.record_event())

    def _read(self, index: int) -> dict[str, Tensor]:
        parts = self._layers[index].parts
        return {name: self._source.read(name, part.cut) for name, part in parts.items()}
