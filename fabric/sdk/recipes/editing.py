"""Rank-one editing: a fact put into one matrix of a model, for the caller's own runs alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

from fabric.errors import PointUnknown, RequestInvalid
from fabric.messages import PointManifest
from fabric.sdk.arrays import Array
from fabric.sdk.recipes.asking import (
    Answer,
    Options,
    asking,
    labels_of,
    positions_of,
    token_id,
)
from fabric.sdk.tracing.edit import Edit
from fabric.sdk.tracing.run import TracedRun
from fabric.sdk.tracing.session import Session, Target
from fabric.sdk.tracing.values import Value

_DOWN = ("mlp.down_proj.weight", "mlp.c_proj.weight", "mlp.dense_4h_to_h.weight")
"""What families call the matrix from ``mlp.act`` to ``mlp.out``."""


def rank_one_edit(
    target: Target,
    prompt: str,
    subject: str,
    *,
    answer: Answer,
    layer: int,
    prefixes: Sequence[str] = (),
    keys: Sequence[str] = (),
    num_steps: int = 20,
    rate: float = 0.5,
    decay: float = 0.0015,
    max_ratio: float = 4.0,
    ridge: float = 1e-2,
    **options: Unpack[Options],
) -> Edit:
    """Find the change of one MLP matrix after which a subject's prompt is answered otherwise.

    The key is what the layer's MLP has in mind at the subject's last token. The value is found by
    gradient descent on the MLP's output there. Both make the change of rank one
    W + (v - W k)(C⁻¹k)ᵀ / ((C⁻¹k)ᵀk), with C the second moment of other keys, which it leaves
    alone. ``t.overlay(edit)`` puts it into any run.

    Args:
        target: The model.
        prompt: Has the subject in it, and ends before the answer.
        subject: A text; its last token is where the fact is looked up.
        answer: The token it shall be answered with.
        layer: Whose MLP is changed.
        prefixes: Texts to put before the prompt; keys and losses are averaged over them.
        keys: Texts over whose tokens C is estimated.
        num_steps: Of the descent; each is one program.
        rate: Of Adam.
        decay: Of the value towards what it was.
        max_ratio: The longest change of the value, over the value's own length.
        ridge: Added to C's diagonal, times its mean: few keys leave C singular.
        **options: See ``Options``.

    Raises:
        PointUnknown: The layer has no single matrix there.
        RequestInvalid: A text is not what it should be.

    Source: Meng et al., "Locating and Editing Factual Associations in GPT", arXiv:2202.05262,
    section 3.1 and its code (without the divergence from the subject's essence).
    """
    import numpy as np

    with Session(target, dry_run=True, **options) as session:
        weight = _matrix_of(session.manifest, layer)
        wanted = token_id(session, answer)
        prompts = [f"{prefix}{prompt}" for prefix in ("", *prefixes)]
        places = [positions_of(labels_of(session, text), subject)[-1] for text in prompts]
    with asking(target, **options) as session:
        found = []
        for text, place in zip(prompts, places, strict=True):
            mlp = session.run(text).layers[layer].mlp
            found.append((mlp.act[place].save(), mlp.out[place].save()))
        others = [session.run(text).layers[layer].mlp.act.save() for text in keys]
    key = np.mean([act.value for act, _ in found], axis=0)
    before = np.mean([out.value for _, out in found], axis=0)
    descent = _Descent(before, rate=rate, decay=decay, max_ratio=max_ratio)
    for _ in range(num_steps):
        with asking(target, **options) as session:
            slopes = []
            for text, place in zip(prompts, places, strict=True):
                run = session.run(text)
                slopes.append(_slope(run, layer, place, descent.value, wanted).save())
        descent.step(np.mean([slope.value for slope in slopes], axis=0))
    direction = _whiten(key, [other.value for other in others], ridge)
    scale = float(direction @ key)
    if not scale > 0.0:
        raise RequestInvalid(param="subject", value=subject, reason="the layer's key there is zero")
    change = (descent.value - before) / scale
    return Edit(weight, change[:, None].astype("f4"), direction[:, None].astype("f4"))


def _slope(run: TracedRun, layer: int, place: int, value: Array, wanted: int) -> Value:
    """Return how the loss changes with the value, [hidden]."""
    out = run.layers[layer].mlp.out
    out[place] = value
    loss = -run.logits[-1].log_softmax()[wanted]
    return run.grad(loss, wrt=out[place])


def _matrix_of(manifest: PointManifest, layer: int) -> str:
    for name in manifest.weights:
        if f".{layer}." in name and name.endswith(_DOWN):
            return name
    raise PointUnknown(
        point=f"layers.{layer}.mlp", reason="it has no single matrix to the MLP's output"
    )


def _whiten(key: Array, others: Sequence[Array], ridge: float) -> Array:
    """Return C⁻¹ k, [in]; k itself where there are no other keys."""
    import numpy as np

    if not others:
        return key
    rows = np.concatenate(others).astype("f8")
    moment = rows.T @ rows / len(rows)
    moment[np.diag_indices_from(moment)] += ridge * np.trace(moment) / len(moment)
    direction: Array = np.linalg.solve(moment, key.astype("f8"))
    return direction


class _Descent:
    """Adam on the change of a vector, which is kept short.

    Source: Kingma and Ba, arXiv:1412.6980, with its default betas.
    """

    def __init__(self, start: Array, *, rate: float, decay: float, max_ratio: float) -> None:
        import numpy as np

        self._start = start.astype("f8")
        self._change = np.zeros_like(self._start)
        self._first = np.zeros_like(self._start)
        self._second = np.zeros_like(self._start)
        self._count = 0
        self._rate, self._decay = rate, decay
        self._longest = max_ratio * float(np.linalg.norm(self._start))

    @property
    def value(self) -> Array:
        """The vector now."""
        value: Array = self._start + self._change
        return value

    def step(self, slope: Array) -> None:
        """Go one step down."""
        import numpy as np

        self._count += 1
        pull = 2.0 * self._decay * self._change / max(float(self._start @ self._start), 1e-12)
        slope = slope.astype("f8") + pull
        self._first = 0.9 * self._first + 0.1 * slope
        self._second = 0.999 * self._second + 0.001 * slope**2
        first = self._first / (1.0 - 0.9**self._count)
        second = self._second / (1.0 - 0.999**self._count)
        self._change = self._change - self._rate * first / (np.sqrt(second) + 1e-8)
        length = float(np.linalg.norm(self._change))
        if length > self._longest:
            self._change *= self._longest / length
