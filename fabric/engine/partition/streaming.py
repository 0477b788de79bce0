"""Weights that do not fit: the matrices of a layer are read when it runs, and given up after it.

While one layer computes, a thread reads the next one, so at most two are in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from torch import Tensor, nn
from transformers import PreTrainedModel

from fabric.engine.partition.checkpoint import Checkpoint
from fabric.engine.partition.partitioner import Part


@dataclass(slots=True)
class _Layer:
    module: nn.Module
    parts: dict[str, Part] = field(default_factory=dict)
    absent: dict[str, nn.Parameter] = field(default_factory=dict)


class Stream:
    """Brings the matrices of layers from the files, again and again.

    Args:
        model: Its layers are those of its one list of layers.
        checkpoint: Where matrices are read.
    """

    def __init__(self, model: PreTrainedModel, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        lists = (child for child in model.base_model.children() if isinstance(child, nn.ModuleList))
        self._layers = [_Layer(module) for layers in lists for module in layers]
        self._owner = {module: layer for layer in self._layers for module in layer.module.modules()}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self._next: tuple[int, Future[dict[str, Tensor]]] | None = None

    def take(self, name: str, part: Part) -> bool:
        """Keep a tensor in the files, if it is a matrix of a layer; say whether it is."""
        layer = self._owner.get(part.module)
        tensor = getattr(part.module, part.attribute)
        if layer is None or tensor.dim() < 2:
            return False
        layer.parts[name] = part
        layer.absent[name] = tensor
        return True

    def start(self) -> None:
        """Let every layer that has matrices in the files fetch them when it runs."""
        self._layers = [layer for layer in self._layers if layer.parts]
        for index, layer in enumerate(self._layers):
            layer.module.register_forward_pre_hook(self._fetching(index))
            layer.module.register_forward_hook(self._dropping(index))

    @property
    def absent(self) -> set[nn.Parameter]:
        """What stands for the matrices while they are not here."""
        return {tensor for layer in self._layers for tensor in layer.absent.values()}

    def close(self) -> None:
        """Stop reading."""
        self._pool.shutdown(cancel_futures=True)

    def _fetching(self, index: int) -> Callable[..., None]:
        def fetch(*_: object) -> None:
            tensors = self._take_read(index)
            following = (index + 1) % len(self._layers)
            self._next = following, self._pool.submit(self._read, following)
            for name, part in self._layers[index].parts.items():
                weight = nn.Parameter(tensors[name], requires_grad=False)
                setattr(part.module, part.attribute, weight)

        return fetch

    def _dropping(self, index: int) -> Callable[..., None]:
        def drop(*_: object) -> None:
            layer = self._layers[index]
            for name, part in layer.parts.items():
                setattr(part.module, part.attribute, layer.absent[name])

        return drop

    def _take_read(self, index: int) -> dict[str, Tensor]:
        """Return a layer's matrices: those that were read ahead, if they are its."""
        ahead, self._next = self._next, None
        if ahead is None:
            return self._read(index)
        tensors = ahead[1].result()
        return tensors if ahead[0] == index else self._read(index)

    def _read(self, index: int) -> dict[str, Tensor]:
        parts = self._layers[index].parts
        return {name: self._checkpoint.read(name, part.cut) for name, part in parts.items()}
