"""Loads one rank's part of a model: modules first, then only the tensors it has a place for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from fabric.engine.model import LOCAL, digest_tensors, read_config
from fabric.engine.partition.checkpoint import (
    Checkpoint,
    Cut,
    SafetensorsFiles,
    StateDict,
    tied_names,
)
from fabric.engine.partition.groups import Groups
from fabric.engine.partition.partitioner import Part, Partitioner, Parts
from fabric.engine.partition.stages import keep_stage
from fabric.engine.partition.streaming import HostMemory, Stream
from fabric.errors import ModelNotLoadable


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedPart:
    """One rank's part of a model; ``digest`` is of the whole, and empty on ranks but the first."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    digest: str
    stream: Stream | None


def load_part(
    path: Path,
    *,
    name: str,
    dtype: torch.dtype,
    groups: Groups,
    partitioner: Partitioner,
    offload: str,
    device: torch.device,
) -> LoadedPart:
    """Load what a rank holds. The first rank reads every tensor, one at a time, to digest it.

    Args:
        path: A transformers directory or a GGUF file; the latter is read whole by every rank.
        name: What errors call the model.
        dtype: Of all tensors.
        groups: The exchanges of this rank; none happens here.
        partitioner: Divides the matrices.
        offload: ``disk``: the layers' matrices stay in the files until they are needed; ``host``:
            in the host's memory.
        device: Where the rest goes once it is read.

    Raises:
        ModelNotLoadable: Files are missing or damaged, or the model cannot be divided so.
    """
    model, tokenizer, checkpoint = _open(path, dtype, offload=offload)
    tied = tied_names(model)
    parts: Parts = {}
    if groups.place.layout.tensor > 1:
        parts = partitioner.divide(model, groups, name=name)
    keep_stage(model, groups, name=name)
    homes = _Homes(model, tied, parts)
    stream = None
    if offload != "none":
        source = HostMemory(checkpoint) if offload == "host" else checkpoint
        stream = Stream(model, source, device)
    filling = _fill(checkpoint, homes, stream, whole=groups.place.rank == 0)
    digest = ""
    if groups.place.rank == 0:
        digest = digest_tensors(filling)
    else:
        for _ in filling:
            pass
    absent = set() if stream is None else stream.absent
    left = [
        path for path, tensor in model.named_parameters() if tensor.is_meta and tensor not in absent
    ]
    if left:
        raise ModelNotLoadable(model=name, reason=f"no tensor of it fills {', '.join(left[:3])}")
    model.eval().requires_grad_(False)
    if stream is not None:
        stream.start()
    if groups.place.layout.tensor > 1:
        partitioner.complete(model, groups)
    move_part(model, device)
    return LoadedPart(model=model, tokenizer=tokenizer, digest=digest, stream=stream)


def move_part(model: PreTrainedModel, device: torch.device) -> None:
    """Put a part on its rank's device, but for what its layers fetch when they run."""
    moved: dict[Tensor, nn.Parameter] = {}  # a tied tensor stays one
    for module in model.modules():
        for name, x in module._parameters.items():
            if x is None or x.is_meta or x.device == device:
                continue
            if x not in moved:
                moved[x] = nn.Parameter(x.to(device), requires_grad=False)
            module._parameters[name] = moved[x]
        for name, x in module._buffers.items():
            module._buffers[name] = None if x is None else x.to(device)


def _open(
    path: Path, dtype: torch.dtype, *, offload: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, Checkpoint]:
    """Return the modules without weights, the tokenizer, and what reads the weights."""
    if path.is_file():
        if offload != "none":
            raise ModelNotLoadable(
                model=str(path),
                reason="a GGUF file is dequantized whole, so it cannot be offloaded; convert it to"
                " a transformers directory, or set offload to none",
            )
        from fabric.engine.gguf import load_gguf  # a directory needs no GGUF reader

        whole, tokenizer = load_gguf(path, dtype)
        model = _build(whole.config, dtype)
        model.generation_config = whole.generation_config
        return model, tokenizer, StateDict(whole)
    model = _build(read_config(path), dtype)
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    return model, AutoTokenizer.from_pretrained(path, **LOCAL), SafetensorsFiles(path, model)


def _build(config: object, dtype: torch.dtype) -> PreTrainedModel:
    # Buffers that are in no file (rotary frequencies) are computed when modules are made.
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    return model


class _Homes:
    """Where the tensors of the undivided model are kept on this rank."""

    def __init__(
        self,
        model: PreTrainedModel,
        tied: dict[str, tuple[str, ...]],
        parts: Parts,
    ) -> None:
        self._model = model
        self._tied = tied
        self._parts = parts
        self._here = set(model.modules())

    def of(self, name: str) -> list[Part]:
        """Return the places of a tensor, by any of its names; none if it is another rank's."""
        parts = (self._part(one) for one in self._tied.get(name, (name,)))
        return [part for part in parts if part is not None and part.module in self._here]

    def _part(self, name: str) -> Part | None:
        if name in self._parts:
            return self._parts[name]
        path, _, attribute = name.rpartition(".")
        try:
            module = self._model.get_submodule(path)
        except AttributeError:
            return None
        if attribute not in module._parameters and attribute not in module._buffers:
            return None
        return Part(module=module, attribute=attribute, cut=None)


def _fill(
    checkpoint: Checkpoint, homes: _Homes, stream: Stream | None, *, whole: bool
) -> Iterator[tuple[str, Tensor]]:
    """Give every tensor its place; yield those that were read, by name.

    Args:
        checkpoint: What they are read from.
        homes: Where they go.
        stream: Takes those that are to stay in the files.
        whole: Read all of each, also what is for other ranks.
    """
    for name in checkpoint.names():
        places = homes.of(name)
        if not places and not whole:
            continue
        streamed = stream is not None and all(stream.take(name, place) for place in places)
        if not whole and streamed:
            continue
        cut = None if whole or not places else places[0].cut
        tensor = checkpoint.read(name, cut)
        kept: dict[Cut | None, nn.Parameter] = {}
        for place in () if streamed else places:
            if place.cut not in kept:
                own = tensor if place.cut == cut else place.cut.of(tensor)  # type: ignore[union-attr]
                kept[place.cut] = nn.Parameter(own.clone(), requires_grad=False)
            _put(place, kept[place.cut])
        yield name, tensor


def _put(place: Part, parameter: nn.Parameter) -> None:
    if place.attribute in place.module._buffers:
        setattr(place.module, place.attribute, parameter.data)
    else:
        setattr(place.module, place.attribute, parameter)
