"""Patching: which places carry what makes the difference between two prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Unpack

from fabric.errors import RequestInvalid
from fabric.sdk.arrays import Array
from fabric.sdk.heatmap import Heatmap
from fabric.sdk.programs import ProgramResult
from fabric.sdk.recipes.asking import (
    Answer,
    Options,
    asking,
    labels_of,
    layers_of,
    point_at,
    positions_of,
    same_length,
    token_id,
)
from fabric.sdk.tracing.run import Prompt, TracedRun
from fabric.sdk.tracing.session import Session, Target
from fabric.sdk.tracing.sweep import NamedArray
from fabric.sdk.tracing.values import Value

RUNS_A_PROGRAM = 256
"""A larger sweep goes in several programs, one after the other: each has a time limit, and shares
its machine. Each has a clean and a corrupt run of its own, which costs less than to send their
states to and fro."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PatchGrid:
    """What a change at each layer and position does.

    Attributes:
        effect: With the axes ``layer`` and ``position``.
        measure: What the effect is.
        clean: The same measure of the clean run.
        corrupt: Of the corrupt run.
        columns: The tokens at the positions.
        results: Where it was computed, and for how much.
    """

    title: str
    measure: str
    effect: NamedArray = field(repr=False)
    clean: float
    corrupt: float
    columns: tuple[str, ...]
    results: tuple[ProgramResult, ...] = field(repr=False)

    @property
    def restored(self) -> Array:
        """The part of the way from corrupt (0) to clean (1), [layers, positions]."""
        part: Array = (self.effect.array - self.corrupt) / (self.clean - self.corrupt)
        return part

    @property
    def heatmap(self) -> Heatmap:
        """The effect by its colour."""
        rows = tuple(f"layer {layer}" for layer in self.effect.axes["layer"])
        return Heatmap(
            cells=[[f"{value:.2f}" for value in row] for row in self.effect.array],
            values=self.effect.array,
            rows=rows,
            columns=self.columns,
            title=self.title,
            legend=self.measure,
            around_zero=bool((self.effect.array < 0).any()),
        )

    def save(self, path: str | Path) -> None:
        """Write the heat map as a ``.png`` or a ``.html`` file."""
        self.heatmap.save(path)

    def _repr_html_(self) -> str:
        return self.heatmap.to_html()


def activation_patching(
    target: Target,
    clean: Prompt,
    corrupt: Prompt,
    *,
    answer: Answer,
    instead: Answer,
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    point: str = "layers.{i}.out",
    **options: Unpack[Options],
) -> PatchGrid:
    """Put the clean run's state into the corrupt run, one layer and position at a time.

    Args:
        target: The model.
        clean: The prompt whose answer is ``answer``.
        corrupt: As many tokens, with the answer ``instead``.
        answer: A token.
        instead: Another.
        layers: Which; all by default.
        positions: Which; all by default.
        point: What is put.
        **options: See ``Options``.

    Returns:
        The logit of ``answer`` over that of ``instead``, at the last token.

    Source: Heimersheim and Nanda, "How to use and interpret activation patching",
    arXiv:2404.15255 (denoising, with the logit difference).
    """
    plan = _Plan.of(target, corrupt, (answer, instead), layers, positions, options, clean=clean)

    def run_some(some: _Cells) -> _Part:
        with asking(target, **options) as session:
            base = session.run(clean, id="clean")
            other = session.run(corrupt, id="corrupt")
            ends = [_difference(run, plan.answers).save("measure") for run in (base, other)]
            grid = session.sweep(corrupt, layer=some.layers, position=some.positions)
            for run, layer, position in grid:
                at = point_at(point, layer)
                if at == f"layers.{layer}.out" and layer < plan.layers[-1]:
                    # Below the change it is the corrupt run: it enters with what that has there.
                    run.start_at(layer + 1, other.place(at))
                    run.place(f"layers.{layer + 1}.in")[position] = base.place(at)[position]
                else:
                    run.place(at)[position] = base.place(at)[position]
                _difference(run, plan.answers).save("measure")
        effect = grid["measure"].array
        return _Part(some, effect, float(ends[0]), float(ends[1]), (session.done,))

    return plan.gather(
        [run_some(some) for some in plan.batches], "Activation patching", "logit difference"
    )


def causal_tracing(
    target: Target,
    prompt: Prompt,
    subject: str,
    *,
    answer: Answer,
    sigma: float,
    samples: int = 10,
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    point: str = "layers.{i}.out",
    **options: Unpack[Options],
) -> PatchGrid:
    """Blur a subject's embeddings, then give back one clean state, at each layer and position.

    Args:
        target: The model.
        prompt: Has the subject in it.
        subject: A text.
        answer: The token whose probability is measured.
        sigma: Standard deviation of the noise; the source takes three times the embeddings' own.
        samples: Draws of the noise, over which the probability is averaged.
        layers: Which; all by default.
        positions: Which; all by default.
        point: What is given back.
        **options: See ``Options``.

    Returns:
        The probability of the answer.

    Source: Meng et al., "Locating and Editing Factual Associations in GPT", arXiv:2202.05262,
    section 2.
    """
    plan = _Plan.of(target, prompt, (answer,), layers, positions, options, subject=subject)

    def blurred(run: TracedRun, seed: int) -> TracedRun:
        # Noise is drawn by its node's number: it comes first, so it is the same in all runs.
        place = run.embed.out[list(plan.subject)]
        place += run.noise(place, sigma=sigma, seed=seed)
        return run

    def run_some(some: _Cells, seed: int) -> _Part:
        with asking(target, **options) as session:
            base = session.run(prompt, id="clean")
            other = blurred(session.run(prompt, id="corrupt"), seed)
            ends = [_probability(run, *plan.answers).save("measure") for run in (base, other)]
            grid = session.sweep(prompt, layer=some.layers, position=some.positions)
            for run, layer, position in grid:
                at = point_at(point, layer)
                blurred(run, seed).place(at)[position] = base.place(at)[position]
                _probability(run, *plan.answers).save("measure")
        effect = grid["measure"].array
        return _Part(some, effect, float(ends[0]), float(ends[1]), (session.done,))

    parts = [_mean([run_some(some, seed) for seed in range(samples)]) for some in plan.batches]
    return plan.gather(parts, "Causal tracing", "probability")


def attribution_patching(
    target: Target,
    clean: Prompt,
    corrupt: Prompt,
    *,
    answer: Answer,
    instead: Answer,
    layers: Sequence[int] | None = None,
    point: str = "layers.{i}.out",
    **options: Unpack[Options],
) -> PatchGrid:
    """Estimate activation patching everywhere by one gradient: (clean - corrupt) · ∇.

    Args:
        target: The model.
        clean: The prompt whose answer is ``answer``.
        corrupt: As many tokens, with the answer ``instead``.
        answer: A token.
        instead: Another.
        layers: Which; all by default.
        point: What would be put.
        **options: See ``Options``.

    Returns:
        What the logit difference would be, to first order.

    Source: Nanda, "Attribution Patching: Activation Patching At Industrial Scale", 2023.
    """
    plan = _Plan.of(target, corrupt, (answer, instead), layers, None, options, clean=clean)
    with asking(target, **options) as session:
        base = session.run(clean, id="clean")
        other = session.run(corrupt, id="corrupt")
        measured = [_difference(run, plan.answers) for run in (base, other)]
        ends = [measure.save("measure") for measure in measured]
        products = []
        for layer in plan.layers:
            place = other.place(point_at(point, layer))
            slope = other.grad(measured[1], wrt=place)
            clean_state = base.place(point_at(point, layer))
            change = (other.value(clean_state) - place) * slope
            products.append(change.sum(-1).save(f"layer {layer}"))
    import numpy as np

    estimate = float(ends[1]) + np.stack([one.value for one in products])
    part = _Part(plan.cells, estimate, float(ends[0]), float(ends[1]), (session.done,))
    return plan.gather([part], "Attribution patching", "logit difference, to first order")


@dataclass(frozen=True, slots=True)
class _Cells:
    """A rectangle of a grid."""

    layers: tuple[int, ...]
    positions: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """Some cells' effects [layers, positions], and the measure of the runs they lie between."""

    cells: _Cells
    effect: Array
    clean: float
    corrupt: float
    results: tuple[ProgramResult, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What a sweep goes over, with everything in numbers."""

    layers: tuple[int, ...]
    positions: tuple[int, ...]
    labels: tuple[str, ...]
    answers: tuple[int, ...]
    subject: tuple[int, ...]

    @classmethod
    def of(
        cls,
        target: Target,
        prompt: Prompt,
        answers: Sequence[Answer],
        layers: Sequence[int] | None,
        positions: Sequence[int] | None,
        options: Options,
        *,
        clean: Prompt | None = None,
        subject: str | None = None,
    ) -> _Plan:
        with Session(target, dry_run=True, **options) as session:
            labels = labels_of(session, prompt)
            if clean is not None:
                same_length(session, clean, prompt, labels)
            where = range(len(labels)) if positions is None else positions
            for position in where:
                if not -len(labels) <= position < len(labels):
                    raise RequestInvalid(
                        param="positions",
                        value=position,
                        reason=f"the prompt has {len(labels)} tokens",
                    )
            return cls(
                layers=layers_of(session, layers),
                positions=tuple(position % len(labels) for position in where),
                labels=labels,
                answers=tuple(token_id(session, answer) for answer in answers),
                subject=() if subject is None else positions_of(labels, subject),
            )

    @property
    def cells(self) -> _Cells:
        """All of them."""
        return _Cells(self.layers, self.positions)

    @property
    def batches(self) -> Iterator[_Cells]:
        """The cells in order, as many at a time as a program has runs for: whole layers where that
        is possible."""
        for layers in _batched(self.layers, max(RUNS_A_PROGRAM // len(self.positions), 1)):
            for positions in _batched(self.positions, RUNS_A_PROGRAM):
                yield _Cells(layers, positions)

    def gather(self, parts: Sequence[_Part], title: str, measure: str) -> PatchGrid:
        """Return the parts as one grid."""
        import numpy as np

        axes = {"layer": self.layers, "position": self.positions}
        effect = {
            (layer, position): value
            for part in parts
            for layer, row in zip(part.cells.layers, part.effect, strict=True)
            for position, value in zip(part.cells.positions, row, strict=True)
        }
        rows = [[effect[layer, position] for position in self.positions] for layer in self.layers]
        return PatchGrid(
            title=title,
            measure=measure,
            effect=NamedArray(np.array(rows), axes),
            clean=parts[0].clean,
            corrupt=parts[0].corrupt,
            columns=tuple(self.labels[position] for position in self.positions),
            results=tuple(result for part in parts for result in part.results),
        )


def _batched(numbers: tuple[int, ...], most: int) -> Iterator[tuple[int, ...]]:
    return (numbers[at : at + most] for at in range(0, len(numbers), most))


def _mean(parts: Sequence[_Part]) -> _Part:
    """Return the mean over draws of a noise."""
    import numpy as np

    return _Part(
        parts[0].cells,
        np.mean([part.effect for part in parts], axis=0),
        parts[0].clean,
        float(np.mean([part.corrupt for part in parts])),
        tuple(result for part in parts for result in part.results),
    )


def _difference(run: TracedRun, answers: Sequence[int]) -> Value:
    first, second = answers
    logits = run.logits[-1]
    difference: Value = logits[first] - logits[second]
    return difference


def _probability(run: TracedRun, answer: int) -> Value:
    probability: Value = run.logits[-1].softmax()[answer]
    return probability
