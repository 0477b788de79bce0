"""Penalties, biases and min-p are those of transformers and of OpenAI's formula."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fabric.engine.adjustments import Adjustment, adjust
from fabric.engine.sampling import Draw, choose
from fabric.messages import Sampling, TextInput

PROMPT, ANSWER = [3, 3, 5, 7, 1], [2, 7, 2, 2, 9]
VOCABULARY = 40


def logits(num_rows: int = 1) -> torch.Tensor:
    return torch.randn(num_rows, VOCABULARY, generator=torch.Generator().manual_seed(1)) * 3


def adjustment(prompt=PROMPT, answer=ANSWER, **sampling: object) -> Adjustment:
    return Adjustment(sampling=Sampling.model_validate(sampling), prompt=prompt, generated=answer)


@pytest.mark.parametrize("penalty", [0.5, 1.3, 4.0])
def test_repetition_penalty_and_bias_equal_transformers(penalty):
    bias = {2: 5.5, 7: -100.0, 30: 1.0}
    processors = LogitsProcessorList(
        [
            SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()]),
            RepetitionPenaltyLogitsProcessor(penalty),
        ]
    )
    expected = processors(torch.tensor([PROMPT + ANSWER]), logits().clone())
    ours = adjust(logits(), {0: adjustment(repetition_penalty=penalty, logit_bias=bias)})
    torch.testing.assert_close(ours, expected)


def test_presence_and_frequency_follow_openais_formula_over_the_answer():
    expected = logits()
    for token, count in Counter(ANSWER).items():
        expected[0, token] -= count * 0.7 + -1.5
    asked = adjustment(frequency_penalty=0.7, presence_penalty=-1.5)
    torch.testing.assert_close(adjust(logits(), {0: asked}), expected)


def test_other_rows_stay_as_they_are_and_company_changes_nothing():
    given = logits(6)
    asked = {
        1: adjustment(repetition_penalty=1.5),
        2: adjustment(answer=[], presence_penalty=1.0),
        4: adjustment(answer=[8], frequency_penalty=2.0, logit_bias={8: 3.0}),
        5: Adjustment(
            sampling=Sampling(), prompt=[1], generated=[], allowed=np.arange(VOCABULARY) < 3
        ),
    }
    together = adjust(given, asked)
    assert torch.equal(given, logits(6))
    assert torch.equal(together[[0, 2, 3]], given[[0, 2, 3]])
    for row, one in asked.items():
        assert torch.equal(adjust(given[row : row + 1], {0: one})[0], together[row])
    assert together[5].isfinite().tolist() == [token < 3 for token in range(VOCABULARY)]


@pytest.mark.parametrize("temperature", [0.6, 1.4])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (6, 1.0), (0, 0.8), (9, 0.9)])
@pytest.mark.parametrize("min_p", [0.02, 0.3, 1.0])
def test_min_p_keeps_what_transformers_keeps(temperature, top_k, top_p, min_p):
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [MinPLogitsWarper(min_p)]
    expected = warpers(torch.tensor([[0]]), logits()).softmax(-1)[0]
    num = 2000
    draws = [
        Draw(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, uniform=(i + 0.5) / num
        )
        for i in range(num)
    ]
    chosen = choose(logits().expand(num, -1), draws)
    frequencies = np.bincount(chosen, minlength=VOCABULARY) / num
    assert frequencies.tolist() == pytest.approx(expected.tolist(), abs=1e-3)


def test_greedy_with_a_repetition_penalty_equals_generate(tiny, reference):
    prompt = "the cat and the dog and the"
    ids = tiny.texts.prompt_ids(TextInput(text=prompt))
    out = reference.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=24,
        do_sample=False,
        repetition_penalty=1.4,
    )
    crowd = [tiny.greedy("beside it", 24) for _ in range(3)]
    heard = tiny.greedy(prompt, 24, repetition_penalty=1.4)
    assert heard.wait().ids() == out[0, len(ids) :].tolist()
    assert all(other.finished for other in crowd)


def test_penalties_see_the_answers_tokens_and_go_on_after_a_prefix(tiny):
    how = {"temperature": 0.0, "max_tokens": 30, "ignore_eos": True}
    forced = tiny.ask("x", logit_bias={"40": 100.0}, **how).wait().ids()
    assert forced == [40] * 30
    # 2 off at each repetition: the bias of 100 is used up by the others' logits in time.
    penalised = {**how, "logit_bias": {"40": 30.0}, "frequency_penalty": 2.0}
    whole = tiny.ask("x", **penalised).wait().ids()
    assert 5 < whole.count(40) < 30
    rest = tiny.ask("x", prefix=tuple(whole[:9]), **penalised).wait().ids()
    assert whole[:9] + rest == whole


def test_a_bias_for_a_token_that_the_model_does_not_have_is_refused(tiny):
    failure = tiny.greedy("x", 3, logit_bias={"259": 1.0}).failed.failure
    assert failure.code == "invalid_parameter"
    assert failure.detail["param"] == "logit_bias"
