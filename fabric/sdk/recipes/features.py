"""Features: what linear maps and dictionaries read out of hidden states."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Unpack

from fabric.sdk.arrays import Array
from fabric.sdk.programs import ProgramResult
from fabric.sdk.recipes.asking import Options, asking
from fabric.sdk.tracing.operand import Operand
from fabric.sdk.tracing.run import Prompt
from fabric.sdk.tracing.session import Target
from fabric.sdk.tracing.values import Value


@dataclass(frozen=True, kw_only=True, eq=False)
class SparseAutoencoder:
    """A dictionary of features, with F entries.

    Attributes:
        w_enc: [hidden, F].
        b_enc: [F].
        w_dec: [F, hidden].
        b_dec: [hidden].
        threshold: A feature's least activation [F], or one for all, of a JumpReLU; 0 is a ReLU.
        centred: Whether ``b_dec`` is taken away before encoding.
    """

    w_enc: object
    b_enc: object
    w_dec: object
    b_dec: object
    threshold: object = 0.0
    centred: bool = False

    def encode(self, hidden: Operand) -> Value:
        """Return the features' activations [..., F]."""
        value = hidden - self.b_dec if self.centred else hidden.clone()
        before = value @ self.w_enc + self.b_enc
        if isinstance(self.threshold, int | float):
            return before.jumprelu(float(self.threshold))
        return before.where(before > self.threshold, 0.0).relu()

    def decode(self, features: Operand) -> Value:
        """Return what the features stand for [..., hidden]."""
        return features @ self.w_dec + self.b_dec


@dataclass(frozen=True, kw_only=True, eq=False)
class Features:
    """The strongest features of each token.

    Attributes:
        indices: Which, int64 [positions, k].
        activations: How strong, float32 [positions, k].
        error: The length of what the dictionary leaves out, over that of the state, [positions].
        logits: At the last token, [vocabulary]; with the reconstruction where it was put in.
        result: Where it was computed, and for how much.
    """

    indices: Array
    activations: Array
    error: Array
    logits: Array = field(repr=False)
    result: ProgramResult = field(repr=False)


def sparse_autoencoder(
    target: Target,
    prompt: Prompt,
    autoencoder: SparseAutoencoder,
    *,
    point: str,
    k: int = 10,
    substitute: bool = False,
    **options: Unpack[Options],
) -> Features:
    """Encode the states at a point where the model is; only the strongest features come back.

    Args:
        target: The model.
        prompt: A text, or token ids.
        autoencoder: The dictionary, made for this point.
        point: ``layers.5.out``, …
        k: How many features a token.
        substitute: Whether the model goes on with the reconstruction.
        **options: See ``Options``.

    Source: Bricken et al., "Towards Monosemanticity", 2023 (ReLU, centred); Rajamanoharan et al.,
    "Jumping Ahead", arXiv:2407.14435, equations 3 to 5 (JumpReLU).
    """
    with asking(target, **options) as session:
        run = session.run(prompt)
        place = run.place(point)
        hidden = place.clone()
        features = autoencoder.encode(hidden)
        decoded = autoencoder.decode(features)
        strongest = features.topk(k).save("features")
        error = ((hidden - decoded).norm() / hidden.norm()).save("error")
        if substitute:
            place.set(decoded)
        logits = run.logits[-1].save("logits")
    return Features(
        indices=strongest.indices.value,
        activations=strongest.values.value,
        error=error.value,
        logits=logits.value,
        result=session.done,
    )


def probe(
    target: Target,
    prompt: Prompt,
    *,
    point: str,
    weight: object,
    bias: object = None,
    **options: Unpack[Options],
) -> Array:
    """Return what a trained linear classifier says of each token's state.

    Args:
        target: The model.
        prompt: A text, or token ids.
        point: ``layers.5.out``, …
        weight: [classes, hidden].
        bias: [classes].
        **options: See ``Options``.

    Returns:
        The classes' scores before any softmax, float32 [positions, classes].

    Source: Alain and Bengio, "Understanding intermediate layers using linear classifier probes",
    arXiv:1610.01644.
    """
    with asking(target, **options) as session:
        scores = session.run(prompt).place(point).linear(weight, bias).save("scores")
    return scores.value
