"""Opens a model on one rank or on several, up to a runner that has been compared with it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fabric.engine.attention import StepAttention
from fabric.engine.cache import BLOCK_TOKENS
from fabric.engine.config import EngineConfig
from fabric.engine.device import choose_cache_bytes, choose_device, uses_flex
from fabric.engine.flex import FlexAttention
from fabric.engine.fused import fuse
from fabric.engine.linear import pack_linears
from fabric.engine.model import LoadedModel, eos_ids_of, read_config, reading
from fabric.engine.partition.crew import Crew
from fabric.engine.partition.groups import Groups, World
from fabric.engine.partition.layout import Layout
from fabric.engine.partition.loading import LoadedPart, load_part
from fabric.engine.partition.orders import Order, write_text
from fabric.engine.partition.partitioner import Partitioner
from fabric.engine.partition.runner import LeadingRunner, PartRunner
from fabric.engine.partition.torch_partitioner import TorchPartitioner
from fabric.engine.probe import (
    LEAST_BLOCKS,
    observe_layers,
    reference_logits,
    run_largest,
    verify_runner,
)
from fabric.engine.runner import Runner
from fabric.engine.source import ModelSource
from fabric.errors import DigestMismatch, FabricError, ModelNotLoadable, RankLost


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """What every rank is told of a model that is to be opened.

    Of ``config`` the device and the layers of each stage are chosen.
    """

    source: str
    name: str
    config: EngineConfig

    @staticmethod
    def of(source: ModelSource, config: EngineConfig, *, name: str) -> Opening:
        """Return what a configuration asks for.

        Raises:
            ModelNotLoadable: The files are missing, or the layers cannot be divided so.
            SettingInvalid: It cannot be where it is asked to be.
        """
        device = choose_device(config)
        with reading(source, name=name):
            num_layers = _num_layers(source)
        if config.offload == "host" and device.type == "cpu":
            raise ModelNotLoadable(
                model=name,
                reason="offload to host memory is for devices with memory of their own, and this"
                " engine computes in the host's; set offload to disk or none",
            )
        if config.offload != "none" and config.partitioner == "deepspeed":
            raise ModelNotLoadable(
                model=name,
                reason="DeepSpeed divides weights that are in memory; set partitioner to torch, or"
                " offload to none",
            )
        layout = Layout.of(
            num_layers,
            tensor=config.tensor_parallel,
            pipeline=config.pipeline_parallel,
            stage_layers=config.stage_layers,
            name=name,
        )
        stage_layers = tuple(map(len, layout.stages))
        chosen = replace(config, device=device.type, stage_layers=stage_layers)
        return Opening(source=str(source), name=name, config=chosen)

    @staticmethod
    def from_json(text: str) -> Opening:
        """Return what ``to_json`` was called on."""
        fields = json.loads(text)
        options = fields["config"]
        config = EngineConfig(**(options | {"stage_layers": tuple(options["stage_layers"])}))
        return Opening(**(fields | {"config": config}))

    def to_json(self) -> str:
        """Return it as text."""
        return json.dumps(dataclasses.asdict(self))

    @property
    def layout(self) -> Layout:
        """Who holds what."""
        config = self.config
        return Layout.of(
            sum(config.stage_layers or ()),
            tensor=config.tensor_parallel,
            pipeline=config.pipeline_parallel,
            stage_layers=config.stage_layers,
            name=self.name,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenPart:
    """A rank's part of a model, ready to run; ``expected_nV`` are logits to compare it with."""

    loaded: LoadedPart
    runner: PartRunner
    expected_nV: Tensor

    def close(self) -> None:
        """Stop reading ahead."""
        if self.loaded.stream is not None:
            self.loaded.stream.close()


def open_model(
    source: ModelSource,
    config: EngineConfig,
    *,
    name: str,
    expected_digest: str | None,
    crew: Crew | None,
) -> tuple[LoadedModel, Runner, Callable[[], None]]:
    """Open a model on rank 0 and, if there is a crew, on the others.

    Args:
        source: Where its files are; the same on all nodes.
        config: How it is divided, and where its weights are.
        name: What errors call it.
        expected_digest: Of the tensors in the configured dtype; ``None`` takes any.
        crew: The other ranks, if the model is divided.

    Raises:
        ModelNotLoadable: Files are missing or damaged, or the model cannot be divided so.
        DigestMismatch: The tensors are not those of ``expected_digest``.
        RankLost: A rank ended meanwhile.

    Returns:
        The model, its runner, and what closes it.
    """
    opening = Opening.of(source, config, name=name)
    if crew is None:
        part = open_part(opening, 0, None, expected_digest=expected_digest)
        runner: Runner = part.runner
    else:
        crew.tell(Order.OPEN, write_text(opening.to_json()))
        with crew.together():
            crew.world.group(opening.layout)
            part = open_part(opening, 0, crew.world, expected_digest=expected_digest)
        runner = LeadingRunner(part.runner, crew)
    verify_runner(runner, part.expected_nV, name=name)
    model, tokenizer = part.loaded.model, part.loaded.tokenizer
    loaded = LoadedModel(
        model=model,
        tokenizer=tokenizer,
        digest=part.loaded.digest,
        eos_ids=eos_ids_of(model, tokenizer),
        context_tokens=getattr(model.config, "max_position_embeddings", None),
        vocabulary=model.config.vocab_size,
    )
    return loaded, runner, functools.partial(_close, part, crew)


def _close(part: OpenPart, crew: Crew | None) -> None:
    if crew is not None:
        with contextlib.suppress(RankLost):
            crew.tell(Order.CLOSE)
    part.close()


def open_part(
    opening: Opening, rank: int, world: World | None, *, expected_digest: str | None = None
) -> OpenPart:
    """Open a rank's part; all ranks do this together.

    Args:
        opening: What all are told.
        rank: Which this one is.
        world: All ranks, grouped by the layout; ``None`` if this is the only one.
        expected_digest: Asked for of rank 0.

    Raises:
        ModelNotLoadable: As in ``open_model``, at every rank.
        DigestMismatch: As in ``open_model``, at rank 0; the others see ``ModelNotLoadable``.
    """
    config = opening.config
    place = opening.layout.place(rank)
    partitioner = get_partitioner(config.partitioner)
    groups = Groups(place, world)
    device = choose_device(config) if world is None else world.device
    loaded = _load(opening, groups, partitioner, device, expected_digest)
    model = loaded.model
    layers = observe_layers(model, name=opening.name, expected=place.layers)
    block_bytes = sum(layer.num_values for layer in layers) * model.dtype.itemsize * BLOCK_TOKENS
    expected = reference_logits(model)
    pack_linears(model)
    fuse(model)
    run = functools.partial(
        run_largest, model, num_tokens=config.step_tokens, num_wanted=config.max_rows
    )
    cache_bytes = choose_cache_bytes(config, device, run)
    num_blocks = groups.least(cache_bytes // block_bytes - 1)
    if num_blocks < LEAST_BLOCKS:
        raise ModelNotLoadable(
            model=opening.name,
            reason=f"cache_bytes is {cache_bytes} on rank {rank}, and one of the ranks has too"
            f" little for {LEAST_BLOCKS + 1} cache blocks; divide the model among more, or raise"
            " cache_bytes",
        )
    runner = PartRunner(
        model,
        layers,
        num_blocks=num_blocks,
        groups=groups,
        vocabulary=model.config.vocab_size,
        divided=place.layout.tensor > 1 and partitioner.divides_logits,
        attention=FlexAttention if uses_flex(config, device) else StepAttention,
    )
    return OpenPart(loaded=loaded, runner=runner, expected_nV=runner.collect(expected))


def get_partitioner(kind: str) -> Partitioner:
    """Return what divides matrices: ``torch`` or ``deepspeed``."""
    if kind == "deepspeed":
        from fabric.engine.partition.deepspeed_partitioner import DeepSpeedPartitioner

        return DeepSpeedPartitioner()
    return TorchPartitioner()


def _load(
    opening: Opening,
    groups: Groups,
    partitioner: Partitioner,
    device: torch.device,
    expected_digest: str | None,
) -> LoadedPart:
    """Load a rank's part; if any rank cannot, none goes on."""
    source = ModelSource.parse(opening.source)
    loaded, failed = None, None
    try:
        with reading(source, name=opening.name):
            loaded = load_part(
                source.resolve(),
                name=opening.name,
                dtype=getattr(torch, opening.config.dtype),
                groups=groups,
                partitioner=partitioner,
                offload=opening.config.offload,
                device=device,
            )
        if expected_digest not in (None, loaded.digest):
            raise DigestMismatch(
                name=opening.name, expected=str(expected_digest), actual=loaded.digest
            )
    except FabricError as error:
        failed = error
    problem = groups.share_problem(failed.message if failed else "")
    if failed is None and not problem:
        assert loaded is not None, "it was loaded, or it failed"
        return loaded
    if failed is not None:
        raise failed
    raise ModelNotLoadable(model=opening.name, reason=f"another rank said: {problem}")


def _num_layers(source: ModelSource) -> int:
    path = source.resolve()
    if path.is_file():
        from fabric.engine.gguf import read_gguf_config

        config = read_gguf_config(path)
    else:
        config = read_config(path)
    num_layers: int = config.get_text_config().num_hidden_layers
    return num_layers
