"""Reads a model's tensors one at a time, or parts of them, from its safetensors files.

Files may name and arrange tensors otherwise than the modules do (experts one by one, say);
transformers' own conversion tables say how, and are followed tensor by tensor.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from fabric.errors import ModelNotLoadable


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Part of a tensor: ranges of one dimension, one after the other."""

    dim: int
    ranges: tuple[range, ...]

    @property
    def size(self) -> int:
        """What is left of the dimension."""
        return sum(map(len, self.ranges))

    def of(self, tensor: Tensor) -> Tensor:
        """Return the part, in memory of its own."""
        parts = [tensor.narrow(self.dim, r.start, len(r)) for r in self.ranges]
        return torch.cat(parts, self.dim) if len(parts) > 1 else parts[0].clone()


class Checkpoint(Protocol):
    """The tensors of one model, by the names that its modules give them."""

    def names(self) -> Sequence[str]:
        """Return all names, sorted; of tied tensors the one that sorts first."""

    def read(self, name: str, cut: Cut | None = None) -> Tensor:
        """Return a tensor, or part of it, in the model's dtype and in memory of its own."""


class StateDict:
    """A ``Checkpoint`` that is in memory: what a GGUF file was dequantized to."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._tensors: dict[str, Tensor] = model.state_dict()
        tied = tied_names(model)
        self._names = [one for one in sorted(self._tensors) if one == tied.get(one, (one,))[0]]

    def names(self) -> Sequence[str]:
        """See ``Checkpoint``."""
        return self._names

    def read(self, name: str, cut: Cut | None = None) -> Tensor:
        """See ``Checkpoint``."""
        tensor = self._tensors[name]
        return cut.of(tensor) if cut else tensor.clone()


@dataclass(slots=True)
class _Origin:
    """Where a tensor comes from: keys of the files by the pattern that found them."""

    converter: WeightConverter | None
    keys: dict[str, list[str]] = field(default_factory=dict)


class SafetensorsFiles:
    """A ``Checkpoint`` over a transformers directory.

    Args:
        path: The directory.
        model: Its modules, without weights; what shapes and dtypes it wants.

    Raises:
        ModelNotLoadable: A tensor that the modules need is in no file.
    """

    def __init__(self, path: Path, model: PreTrainedModel) -> None:
        self._wanted: dict[str, Tensor] = model.state_dict()
        self._model = model
        self._files = dict(_keys_of(path))
        self._aliases = tied_names(model)
        self._origins = self._find_origins()
        for name in self._wanted:
            if self._origin(name) is None:
                raise ModelNotLoadable(model=str(path), reason=f"no file of it has {name!r}")

    def names(self) -> Sequence[str]:
        """See ``Checkpoint``."""
        return [name for name in sorted(self._wanted) if name == self._names(name)[0]]

    def read(self, name: str, cut: Cut | None = None) -> Tensor:
        """See ``Checkpoint``."""
        origin = self._origin(name)
        assert origin is not None, "the constructor has looked"
        wanted = self._wanted[name]
        if origin.converter is None:
            ((key,),) = origin.keys.values()
            tensor = self._read_key(key, cut)
        else:
            tensor = self._convert(name, origin, cut)
        shape = list(wanted.shape)
        if cut is not None:
            shape[cut.dim] = cut.size
        if list(tensor.shape) != shape:
            raise ModelNotLoadable(
                model=str(next(iter(self._files.values())).parent),
                reason=f"its files hold {name!r} as {list(tensor.shape)}, not as {shape}",
            )
        return tensor.to(wanted.dtype)

    def _origin(self, name: str) -> _Origin | None:
        return next((self._origins[one] for one in self._names(name) if one in self._origins), None)

    def _names(self, name: str) -> tuple[str, ...]:
        return self._aliases.get(name, (name,))

    def _find_origins(self) -> dict[str, _Origin]:
        transforms = get_model_conversion_mapping(self._model)
        renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
        converters = [one for one in transforms if isinstance(one, WeightConverter)]
        by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
        prefix = self._model.base_model_prefix
        origins: dict[str, _Origin] = {}
        for key in sorted(self._files, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, self._wanted)
            if name not in self._wanted and key in self._wanted:
                name, pattern = key, None
            if name not in self._wanted:
                continue
            origin = origins.setdefault(name, _Origin(by_pattern[pattern] if pattern else None))
            origin.keys.setdefault(pattern or key, []).append(key)
        return origins

    def _read_key(self, key: str, cut: Cut | None) -> Tensor:
        with safe_open(self._files[key], framework="pt") as file:
            if cut is None:
                whole: Tensor = file.get_tensor(key)
                return whole
            view = file.get_slice(key)
            before = (slice(None),) * cut.dim
            return torch.cat([view[(*before, slice(r.start, r.stop))] for r in cut.ranges], cut.dim)

    def _convert(self, name: str, origin: _Origin, cut: Cut | None) -> Tensor:
        """Put a tensor together as transformers does; of experts only the part that is wanted."""
        converter = copy.deepcopy(origin.converter)
        assert converter is not None, "asked for by its converter"
        cuts = _before_merging(converter, cut, self._wanted[name])
        for pattern, keys in origin.keys.items():
            before = cuts.get(pattern) if cuts else None
            for key in keys:
                converter.add_tensor(name, key, pattern, _later(self._read_key, key, before))
        made: Any = converter.convert(name, model=self._model, config=self._model.config)[name]
        tensor: Tensor = made[0] if isinstance(made, list) else made
        return cut.of(tensor) if cut is not None and not cuts else tensor


def _keys_of(path: Path) -> Iterator[tuple[str, Path]]:
    """Yield the keys of a directory's files, each with its file."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        for key, file in json.loads(index.read_text())["weight_map"].items():
            yield key, path / file
        return
    file = path / "model.safetensors"
    if not file.is_file():
        raise ModelNotLoadable(model=str(path), reason=f"there is no {file}")
    with safe_open(file, framework="pt") as opened:
        for key in opened.keys():  # noqa: SIM118 (no mapping)
            yield key, file


def tied_names(model: PreTrainedModel) -> dict[str, tuple[str, ...]]:
    """Return, of each tensor that has several names, all of them, sorted."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: tuple(sorted(group)) for group in names.values() if group[1:] for name in group}


def _before_merging(converter: WeightConverter, cut: Cut | None, whole: Tensor) -> dict[str, Cut]:
    """Return what to read of each key, where a converter only stacks matrices; else nothing.

    The matrices are stacked along a new first dimension, and joined, if at all, along the next.
    """
    stacks, *joins = converter.operations
    if cut is None or cut.dim == 0 or not isinstance(stacks, MergeModulelist) or stacks.dim:
        return {}
    patterns = converter.source_patterns
    if joins:
        joined = isinstance(joins[0], Concatenate) and joins[0].dim == cut.dim == 1
        if joins[1:] or not joined or len(cut.ranges) != len(patterns):
            return {}
    size = whole.shape[cut.dim] // len(patterns)
    ranges = [(range(r.start % size, r.start % size + len(r)),) for r in cut.ranges]
    return {
        pattern: Cut(dim=cut.dim - 1, ranges=ranges[index])
        for index, pattern in enumerate(patterns)
    }


def _later(read: Callable[[str, Cut | None], Tensor], key: str, cut: Cut | None) -> Any:
    """Return a read that transformers asks for when it needs it."""
    return lambda: read(key, cut)
