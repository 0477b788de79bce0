"""Published methods of interpretability, each one call: ``from fabric import recipes``.

| recipe | what it tells |
|---|---|
| ``logit_lens``, ``tuned_lens`` | what each layer would say at each position |
| ``attention_lens``, ``lens_logits`` | what each head would say |
| ``activation_patching``, ``attribution_patching`` | which states make a difference |
| ``causal_tracing`` | which states carry a fact |
| ``steering``, ``steering_vector``, ``memory_injection`` | what is said with something added |
| ``ablation`` | what parts are worth |
| ``probe``, ``sparse_autoencoder`` | what states stand for |
| ``rank_one_edit`` | a fact changed, for the caller's runs alone |

All are made of ``fabric.session`` and take a model's name or an engine, as it does.
"""

from fabric.sdk.recipes.ablating import Ablation, ablation
from fabric.sdk.recipes.asking import Options
from fabric.sdk.recipes.editing import rank_one_edit
from fabric.sdk.recipes.features import Features, SparseAutoencoder, probe, sparse_autoencoder
from fabric.sdk.recipes.lenses import Lens, attention_lens, lens_logits, logit_lens, tuned_lens
from fabric.sdk.recipes.patching import (
    PatchGrid,
    activation_patching,
    attribution_patching,
    causal_tracing,
)
from fabric.sdk.recipes.steering import (
    Condition,
    Steered,
    memory_injection,
    steering,
    steering_vector,
)
from fabric.sdk.tracing.edit import Edit

__all__ = [
    "Ablation",
    "Condition",
    "Edit",
    "Features",
    "Lens",
    "Options",
    "PatchGrid",
    "SparseAutoencoder",
    "Steered",
    "ablation",
    "activation_patching",
    "attention_lens",
    "attribution_patching",
    "causal_tracing",
    "lens_logits",
    "logit_lens",
    "memory_injection",
    "probe",
    "rank_one_edit",
    "sparse_autoencoder",
    "steering",
    "steering_vector",
    "tuned_lens",
]
