"""Who holds what: stages of layers, and in each a tensor group that divides heads and widths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fabric.errors import ModelNotLoadable

_UNIT = 32
"""Widths are divided in pieces of this many columns where that leaves a piece for every rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a model is divided.

    Args:
        tensor: Ranks of a tensor group, which divides every matrix of a stage.
        stages: The layers of each pipeline stage.
    """

    tensor: int
    stages: tuple[range, ...]

    @staticmethod
    def of(
        num_layers: int,
        *,
        tensor: int,
        pipeline: int,
        stage_layers: Sequence[int] | None,
        name: str,
    ) -> Layout:
        """Return the layout that options ask for.

        Args:
            num_layers: Layers of the model.
            tensor: Ranks of a tensor group.
            pipeline: Stages.
            stage_layers: Layers of each stage; ``None``: as even as can be.
            name: What errors call the model.

        Raises:
            ModelNotLoadable: The layers cannot be divided so.
        """
        if pipeline > num_layers:
            raise ModelNotLoadable(
                model=name,
                reason=f"its {num_layers} layers cannot make {pipeline} stages; set"
                f" pipeline_parallel to at most {num_layers}",
            )
        if stage_layers is None:
            return Layout(
                tensor=tensor,
                stages=tuple(share(num_layers, pipeline, stage) for stage in range(pipeline)),
            )
        if (len(stage_layers), sum(stage_layers)) != (pipeline, num_layers) or min(
            stage_layers
        ) < 1:
            raise ModelNotLoadable(
                model=name,
                reason=f"stage_layers {list(stage_layers)} do not divide its {num_layers} layers"
                f" into {pipeline} stages; leave stage_layers out, or let them sum to the layers",
            )
        stops = [sum(stage_layers[: stage + 1]) for stage in range(pipeline)]
        return Layout(
            tensor=tensor,
            stages=tuple(
                range(stop - count, stop) for stop, count in zip(stops, stage_layers, strict=True)
            ),
        )

    @property
    def num_ranks(self) -> int:
        """Processes in all."""
        return self.tensor * len(self.stages)

    @property
    def num_layers(self) -> int:
        """Layers of the whole model."""
        return self.stages[-1].stop

    def place(self, rank: int) -> Place:
        """Return what a rank holds: tensor groups are consecutive ranks."""
        return Place(layout=self, rank=rank)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One rank's place in a layout."""

    layout: Layout
    rank: int

    @property
    def stage(self) -> int:
        """Its pipeline stage."""
        return self.rank // self.layout.tensor

    @property
    def tensor_rank(self) -> int:
        """Its place in its stage's tensor group."""
        return self.rank % self.layout.tensor

    @property
    def layers(self) -> range:
        """The layers it works on."""
        return self.layout.stages[self.stage]

    @property
    def is_first(self) -> bool:
        """Whether it takes token ids."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether logits come from it."""
        return self.stage == len(self.layout.stages) - 1

    @property
    def group(self) -> range:
        """The ranks of its tensor group."""
        first = self.stage * self.layout.tensor
        return range(first, first + self.layout.tensor)

    def width(self, total: int) -> range:
        """Return its columns of a matrix; the same for every matrix of that width."""
        unit = _UNIT if total % _UNIT == 0 and total // _UNIT >= self.layout.tensor else 1
        part = share(total // unit, self.layout.tensor, self.tensor_rank)
        return range(part.start * unit, part.stop * unit)


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """The query heads of a rank and the key-value heads they need."""

    query: range
    key_value: range

    @staticmethod
    def of(place: Place, *, num_query: int, num_key_value: int, name: str) -> Heads:
        """Return a rank's heads.

        Where there are fewer key-value heads than ranks, several ranks hold the same one and
        divide its query heads; where they do not divide evenly, some ranks have one more.

        Raises:
            ModelNotLoadable: Some rank would have no query head.
        """
        ranks, rank = place.layout.tensor, place.tensor_rank
        per_group = num_query // num_key_value
        if num_key_value >= ranks:
            own = share(num_key_value, ranks, rank)
            return Heads(query=range(own.start * per_group, own.stop * per_group), key_value=own)
        if len(share(ranks, num_key_value, 0)) > per_group:
            most = num_key_value * per_group
            raise ModelNotLoadable(
                model=name,
                reason=f"its {num_query} query heads over {num_key_value} key-value heads leave"
                f" some of {ranks} ranks without one; set tensor_parallel to at most {most}, and"
                " use pipeline_parallel for more processes",
            )
        head = next(k for k in range(num_key_value) if rank in share(ranks, num_key_value, k))
        sharing = share(ranks, num_key_value, head)
        part = share(per_group, len(sharing), rank - sharing.start)
        first = head * per_group
        return Heads(
            query=range(first + part.start, first + part.stop), key_value=range(head, head + 1)
        )


def share(total: int, parts: int, index: int) -> range:
    """Return part ``index`` of a total that is divided as evenly as whole numbers allow."""
    size, extra = divmod(total, parts)
    start = index * size + min(index, extra)
    return range(start, start + size + (index < extra))
