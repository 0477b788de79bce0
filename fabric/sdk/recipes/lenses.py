"""Lenses: what hidden states would say next, were they the last ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Unpack

from fabric.sdk.arrays import Array
from fabric.sdk.heatmap import Heatmap
from fabric.sdk.programs import ProgramResult
from fabric.sdk.recipes.asking import (
    Options,
    asking,
    labels_of,
    layers_of,
    point_at,
    texts_of,
)
from fabric.sdk.tracing.places import Place
from fabric.sdk.tracing.run import Prompt, TracedRun
from fabric.sdk.tracing.session import Session, Target
from fabric.sdk.tracing.values import SavedTopK, Value


@dataclass(frozen=True, kw_only=True, eq=False)
class Lens:
    """The likeliest tokens at places of a model, in rows (layers) and columns.

    Attributes:
        ids: Their ids, int64 [rows, columns, k].
        probabilities: float32 [rows, columns, k].
        words: What the likeliest one reads as, [rows][columns].
        rows: Labels of the rows.
        columns: Labels of the columns: the prompt's tokens, or heads.
        result: Where it was computed, and for how much.
    """

    title: str
    ids: Array = field(repr=False)
    probabilities: Array = field(repr=False)
    words: tuple[tuple[str, ...], ...] = field(repr=False)
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    result: ProgramResult = field(repr=False)

    @property
    def heatmap(self) -> Heatmap:
        """The likeliest token in each cell, coloured by its probability."""
        return Heatmap(
            cells=self.words,
            values=self.probabilities[:, :, 0],
            rows=self.rows,
            columns=self.columns,
            title=self.title,
            legend="probability of the likeliest token",
        )

    def save(self, path: str | Path) -> None:
        """Write the heat map as a ``.png`` or a ``.html`` file."""
        self.heatmap.save(path)

    def _repr_html_(self) -> str:
        return self.heatmap.to_html()


def logit_lens(
    target: Target,
    prompt: Prompt,
    *,
    layers: Sequence[int] | None = None,
    point: str = "layers.{i}.out",
    k: int = 1,
    **options: Unpack[Options],
) -> Lens:
    """Return what each layer would say at each position: its hidden states, normed and unembedded.

    Args:
        target: The model; see ``fabric.trace``.
        prompt: A text, or token ids.
        layers: Which; all by default.
        point: Where the hidden states are taken.
        k: How many tokens a cell.
        **options: See ``Options``.

    Source: nostalgebraist, "interpreting GPT: the logit lens", 2020.
    """
    with asking(target, **options) as session:
        run = session.run(prompt)
        taken = layers_of(session, layers)
        tops = [_top(run, run.place(point_at(point, layer)), k) for layer in taken]
        columns = labels_of(session, prompt)
        return _finish(session, "Logit lens", tops, taken, columns)


def tuned_lens(
    target: Target,
    prompt: Prompt,
    translators: Mapping[int, tuple[object, object]],
    *,
    point: str = "layers.{i}.out",
    k: int = 1,
    **options: Unpack[Options],
) -> Lens:
    """Return a logit lens through an affine map h + Wh + b for each layer.

    Args:
        target: The model.
        prompt: A text, or token ids.
        translators: W [hidden, hidden] and b [hidden], by layer.
        point: Where the hidden states are taken.
        k: How many tokens a cell.
        **options: See ``Options``.

    Source: Belrose et al., "Eliciting Latent Predictions from Transformers with the Tuned Lens",
    arXiv:2303.08112, equation 5, with translators as residuals as in its code.
    """
    with asking(target, **options) as session:
        run = session.run(prompt)
        taken = layers_of(session, sorted(translators))
        tops = []
        for layer, (weight, bias) in sorted(translators.items()):
            h = run.place(point_at(point, layer))
            tops.append(_top(run, h + h.linear(weight, bias), k))
        columns = labels_of(session, prompt)
        return _finish(session, "Tuned lens", tops, taken, columns)


def attention_lens(
    target: Target,
    prompt: Prompt,
    *,
    lenses: Mapping[int, object] | None = None,
    layers: Sequence[int] | None = None,
    position: int = -1,
    norm: bool = True,
    k: int = 1,
    **options: Unpack[Options],
) -> Lens:
    """Return what each attention head would say at one position: what it adds, unembedded.

    Args:
        target: The model.
        prompt: A text, or token ids.
        lenses: A trained linear map to the vocabulary for each head, [heads, vocabulary, hidden],
            by layer; without any, the model's own unembedding.
        layers: Which; all that have lenses by default.
        position: Of which token.
        norm: Whether the model's own unembedding is of normed states.
        k: How many tokens a head.
        **options: See ``Options``.

    Source: Sakarvadia et al., "Attention Lens", arXiv:2310.16270; without trained lenses the
    projection of head outputs in "Memory Injections", arXiv:2309.05605, section 3.
    """
    with asking(target, **options) as session:
        run = session.run(prompt)
        taken = layers_of(session, sorted(lenses) if lenses and layers is None else layers)
        tops = []
        for layer in taken:
            said = run.layers[layer].attn.head_out[position]
            if lenses is not None:
                logits = run.einsum("hd,hvd->hv", said, lenses[layer])
            else:
                logits = run.lens(said) if norm else run.model.unembed(said)
            tops.append(logits.softmax().topk(k).save(f"layer {layer}"))
        session.execute()
        heads = tuple(f"head {head}" for head in range(tops[0].indices.shape[0]))
        token = labels_of(session, prompt)[position].strip()
        return _finish(session, f"What each head adds at “{token}”", tops, taken, heads)


def lens_logits(
    target: Target,
    prompt: Prompt,
    lenses: Mapping[int, object],
    *,
    position: int = -1,
    **options: Unpack[Options],
) -> dict[int, Array]:
    """Return what the heads of a layer say together: the sum over heads of their trained lenses.

    Args:
        target: The model.
        prompt: A text, or token ids.
        lenses: [heads, vocabulary, hidden], by layer.
        position: Of which token.
        **options: See ``Options``.

    Returns:
        Logits, float32 [vocabulary], by layer.

    Source: "Attention Lens", arXiv:2310.16270, section 3: the objective of a layer's lenses.
    """
    with asking(target, **options) as session:
        run = session.run(prompt)
        saved = {
            layer: run.einsum("hd,hvd->v", run.layers[layer].attn.head_out[position], lens).save(
                f"layer {layer}"
            )
            for layer, lens in lenses.items()
        }
    return {layer: logits.value for layer, logits in saved.items()}


def _top(run: TracedRun, hidden: Place | Value, k: int) -> SavedTopK:
    return run.lens(hidden).softmax().topk(k).save()


def _finish(
    session: Session,
    title: str,
    tops: Sequence[SavedTopK],
    layers: Sequence[int],
    columns: tuple[str, ...],
) -> Lens:
    import numpy as np

    result = session.execute()
    ids = np.stack([top.indices.value for top in tops])
    read: Callable[[int], str] = texts_of(session, ids[:, :, 0]).__getitem__
    return Lens(
        title=title,
        ids=ids,
        probabilities=np.stack([top.values.value for top in tops]),
        words=tuple(tuple(read(int(id)) for id in row) for row in ids[:, :, 0]),
        rows=tuple(f"layer {layer}" for layer in layers),
        columns=columns,
        result=result,
    )
