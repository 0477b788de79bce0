"""Tiny random models of four families, with their manifests and oracles over them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from fabric.messages import nodes as n
from fabric.messages.points import PointManifest
from fabric.messages.program import Generate, Program, ProgramRun
from fabric.testing.program_manifest import manifest_of
from fabric.testing.programs import Interpreter, RunOutcome

SIZES: dict[str, object] = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=4, n_positions=64,
                   initializer_range=0.3, bos_token_id=None, eos_token_id=None)
    ),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, head_dim=8, sliding_window=4, attn_logit_softcapping=2.0,
                     final_logit_softcapping=5.0)
    ),
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    ),
}  # fmt: skip
PROMPT = (3, 5, 7, 11, 13, 2)


@dataclass(frozen=True)
class Tiny:
    """One model, plain and as the oracle has it, with the same weights."""

    plain: PreTrainedModel
    oracle: Interpreter
    manifest: PointManifest

    def run(
        self, *nodes: n.Node, ids: tuple[int, ...] = PROMPT, tokens: int = 0, **changes: object
    ) -> RunOutcome:
        """Run one run without constants by the oracle."""
        return self.oracle.run(program_of(*nodes, ids=ids, tokens=tokens, **changes), {})["r"]

    def logits(self, ids: tuple[int, ...] = PROMPT) -> torch.Tensor:
        """Return what transformers gives, [tokens, vocabulary]."""
        with torch.no_grad():
            logits: torch.Tensor = self.plain(torch.tensor([ids])).logits[0]
        return logits


def program_of(
    *nodes: n.Node, ids: tuple[int, ...] = PROMPT, tokens: int = 0, **changes: object
) -> Program:
    """Return a program of one run, called ``r``."""
    fields = {"id": "r", "ids": ids, "gen": Generate(max_tokens=tokens), "nodes": nodes}
    return Program(runs=(ProgramRun.model_validate(fields | changes),))


def tiny_model(family: str) -> Tiny:
    """Return a model of a family, with the same weights every time."""
    torch.manual_seed(11)
    plain = FAMILIES[family]().eval()
    plain.set_attn_implementation("eager")
    twin = FAMILIES[family]().eval()
    twin.load_state_dict(plain.state_dict())
    return Tiny(plain, Interpreter(twin), manifest_of(plain))
