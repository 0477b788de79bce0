"""Ablation: what an answer loses when parts of the model say nothing of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Unpack

from fabric.errors import RequestInvalid
from fabric.sdk.arrays import Array
from fabric.sdk.programs import ProgramResult
from fabric.sdk.recipes.asking import Answer, Options, asking, token_id
from fabric.sdk.tracing.places import Place
from fabric.sdk.tracing.run import Prompt, TracedRun
from fabric.sdk.tracing.session import Target
from fabric.sdk.tracing.values import Value

Part = str | tuple[str, int]
"""A point, or a point and one of its heads: ``("layers.5.attn.head_out", 3)``."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Ablation:
    """The log probability of an answer without each part of a model.

    Attributes:
        parts: What was taken away.
        plain: With everything, natural logarithm.
        without: Without each part, float32 [parts].
        result: Where it was computed, and for how much.
    """

    parts: tuple[Part, ...]
    plain: float
    without: Array
    result: ProgramResult = field(repr=False)

    @property
    def effects(self) -> Array:
        """What each part is worth: how much more likely the answer is with it, [parts]."""
        effects: Array = self.plain - self.without
        return effects


def ablation(
    target: Target,
    prompt: Prompt,
    parts: Sequence[Part],
    *,
    answer: Answer,
    kind: Literal["zero", "mean"] = "zero",
    over: Sequence[Prompt] = (),
    **options: Unpack[Options],
) -> Ablation:
    """Take away one part after another, in a run of its own, and measure the answer.

    Args:
        target: The model.
        prompt: A text, or token ids.
        parts: Points, or heads of points.
        answer: The token whose log probability is measured, behind the prompt.
        kind: Whether a part's output becomes 0, or its mean over the tokens of other prompts.
        over: Those prompts; each counts alike.
        **options: See ``Options``.

    Raises:
        RequestInvalid: The prompts for a mean are missing.

    Source: Michel et al., "Are Sixteen Heads Really Better than One?", arXiv:1905.10650 (zero);
    Wang et al., "Interpretability in the Wild", arXiv:2211.00593, section 2.1 (mean).
    """
    if kind == "mean" and not over:
        raise RequestInvalid(
            param="over", value=[], reason="a mean is over prompts; give some, or kind='zero'"
        )
    with asking(target, **options) as session:
        wanted = token_id(session, answer)
        others = [session.run(text) for text in over] if kind == "mean" else []
        plain = _log_probability(session.run(prompt, id="plain"), wanted)
        ablated = []
        for number, part in enumerate(parts):
            run = session.run(prompt, id=f"without{number}")
            means = [run.value(_place(other, part).mean(0)) for other in others]
            total = means[0] if means else run.zeros()
            for mean in means[1:]:
                total = total + mean
            _place(run, part).set(total / len(means) if means else total)
            ablated.append(_log_probability(run, wanted).save("log_probability"))
        plain = plain.save("log_probability")
    import numpy as np

    return Ablation(
        parts=tuple(parts),
        plain=float(plain),
        without=np.array([float(one) for one in ablated], dtype=np.float32),
        result=session.done,
    )


def _place(run: TracedRun, part: Part) -> Place:
    if isinstance(part, str):
        return run.place(part)
    point, head = part
    found: Place = run.place(point)[:, head]
    return found


def _log_probability(run: TracedRun, token: int) -> Value:
    found: Value = run.logits[-1].log_softmax()[token]
    return found
