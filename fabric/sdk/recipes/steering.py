"""Steering: changing what a model says by adding to what it has in mind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Unpack

from fabric.sdk.arrays import Array
from fabric.sdk.programs import ProgramResult
from fabric.sdk.recipes.asking import Options, asking, point_at
from fabric.sdk.tracing.run import Prompt
from fabric.sdk.tracing.session import Target


@dataclass(frozen=True, kw_only=True, eq=False)
class Steered:
    """The same prompt continued twice.

    Attributes:
        plain: What the model says.
        steered: What it says with the change.
        plain_logits: At the prompt's last token, float32 [vocabulary].
        steered_logits: With the change.
        result: Where it was computed, and for how much.
    """

    plain: str
    steered: str
    plain_logits: Array = field(repr=False)
    steered_logits: Array = field(repr=False)
    result: ProgramResult = field(repr=False)


@dataclass(frozen=True, kw_only=True, eq=False)
class Condition:
    """When to steer: where the cosine of a point with a direction is over a threshold.

    Attributes:
        direction: [hidden].
        threshold: Between -1 and 1.
        layer: Of the point; at or before the layer that is steered.
        point: Where the cosine is taken.
        latch: Once it holds, go on to the end.
    """

    direction: object
    threshold: float
    layer: int
    point: str = "layers.{i}.out"
    latch: bool = False


def steering(
    target: Target,
    prompt: Prompt,
    vector: object,
    *,
    layer: int,
    strength: float = 1.0,
    when: Condition | None = None,
    norm: Literal["none", "match", "preserve"] = "none",
    point: str = "layers.{i}.out",
    max_tokens: int = 24,
    **options: Unpack[Options],
) -> Steered:
    """Add a vector to a layer's output at every token, or only where a condition holds.

    Args:
        target: The model.
        prompt: A text, or token ids.
        vector: What is added, [hidden].
        layer: Where.
        strength: How much of it.
        when: A condition for each token.
        norm: ``match`` gives the vector the length of what it is added to, ``preserve`` the sum.
        point: Where in the layer.
        max_tokens: How far both texts go.
        **options: See ``Options``.

    Source: Turner et al., "Activation Addition", arXiv:2308.10248; with a condition Lee et al.,
    "Programming Refusal with Conditional Activation Steering", arXiv:2409.05907.
    """
    with asking(target, **options) as session:
        plain = session.run(prompt, id="plain", max_tokens=max_tokens)
        steered = session.run(prompt, id="steered", max_tokens=max_tokens)
        gate = None
        if when is not None:
            seen = steered.place(point_at(when.point, when.layer))
            gate = seen.cosine(when.direction) > when.threshold
            gate = gate.latch() if when.latch else gate
        place = steered.place(point_at(point, layer))
        place.add(vector, alpha=strength, norm=norm, gate=gate)
        logits = [run.logits[-1].save("logits") for run in (plain, steered)]
    return Steered(
        plain=plain.text,
        steered=steered.text,
        plain_logits=logits[0].value,
        steered_logits=logits[1].value,
        result=session.done,
    )


def steering_vector(
    target: Target,
    towards: Sequence[Prompt],
    away: Sequence[Prompt],
    *,
    layer: int,
    point: str = "layers.{i}.out",
    **options: Unpack[Options],
) -> Array:
    """Return the difference of two sets of prompts: of their mean states at their last tokens.

    Args:
        target: The model.
        towards: Prompts that have it.
        away: Prompts that do not.
        layer: Where it is taken.
        point: Where in the layer.
        **options: See ``Options``.

    Returns:
        float32 [hidden].

    Source: Rimsky et al., "Steering Llama 2 via Contrastive Activation Addition",
    arXiv:2312.06681, equation 1.
    """
    import numpy as np

    with asking(target, **options) as session:
        saved = [
            [session.run(prompt).place(point_at(point, layer))[-1].save() for prompt in prompts]
            for prompts in (towards, away)
        ]
    first, second = (np.mean([one.value for one in some], axis=0) for some in saved)
    difference: Array = first - second
    return difference


def memory_injection(
    target: Target,
    prompt: Prompt,
    memory: Prompt,
    *,
    layer: int,
    strength: float,
    max_tokens: int = 1,
    **options: Unpack[Options],
) -> Steered:
    """Remind a model of something: add the unembedding rows of a memory to an attention output.

    It is added at every position, as the published code does.

    Args:
        target: The model.
        prompt: What it is asked.
        memory: A text, or token ids.
        layer: Whose attention output is added to.
        strength: How many times the sum of the rows.
        max_tokens: How far both texts go.
        **options: See ``Options``.

    Source: Sakarvadia et al., "Memory Injections: Correcting Multi-Hop Reasoning Failures During
    Inference in Transformer-Based Language Models", arXiv:2309.05605, section 4.
    """
    with asking(target, **options) as session:
        ids = [token.id for token in session.tokens(memory)] if isinstance(memory, str) else memory
        plain = session.run(prompt, id="plain", max_tokens=max_tokens)
        injected = session.run(prompt, id="injected", max_tokens=max_tokens)
        remembered = injected.model.unembed_rows(ids).sum(0)
        injected.layers[layer].attn.out.add(remembered, alpha=strength)
        logits = [run.logits[-1].save("logits") for run in (plain, injected)]
    return Steered(
        plain=plain.text,
        steered=injected.text,
        plain_logits=logits[0].value,
        steered_logits=logits[1].value,
        result=session.done,
    )
