"""Weights of 8 bits: close to what they were, and another version of the model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fabric.engine.linear import get_multiplier, quantize
from fabric.errors import DigestMismatch, SettingInvalid

PROMPT = [(7 * i) % 250 for i in range(60)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(32, 64), (100, 24), (259, 66), (7, 5)])
@pytest.mark.parametrize("biased", [False, True])
def test_products_are_within_a_percent_of_float64(dtype, num_outputs, num_inputs, biased):
    torch.manual_seed(1)
    weight, x = torch.randn(num_outputs, num_inputs), torch.randn(37, num_inputs).to(dtype)
    bias = torch.randn(num_outputs).to(dtype) if biased else None
    multiply = get_multiplier(weight.to(dtype), bias, invariant=True, int8=True)
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert float((multiply(x).double() - expected).norm() / expected.norm()) < 0.015
    assert torch.equal(multiply(x)[20:25], multiply(x[20:25]))


def test_each_output_has_its_own_scale_and_zeros_stay_zero():
    levels, scales = quantize(torch.tensor([[1e-3, -2e-3], [500.0, 127.0], [0.0, 0.0]]))
    assert levels.tolist() == [[64, -127], [127, 32], [0, 0]]
    assert scales[1] == pytest.approx(500.0 / 127)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores_stay_near_those_of_full_weights(tiny, drive, dtype):
    driver = drive(weights="int8", dtype=dtype)
    how = {"temperature": 0.0, "max_tokens": 0, "prompt_logprobs": True}
    exact, rough = (d.ask(PROMPT, **how).wait().scored.tokens[1:] for d in (tiny, driver))
    distances = [abs(a.logprob - b.logprob) for a, b in zip(exact, rough, strict=True)]
    assert sum(distances) / len(distances) < 0.1
    assert max(distances) < 0.5
    assert len(driver.greedy(PROMPT, 20, ignore_eos=True).wait().ids()) == 20


def test_it_is_another_version_and_says_so(tiny, drive, tiny_dir):
    driver = drive(weights="int8")
    assert driver.engine.info.dtype == "float32, weights int8"
    assert driver.engine.info.digest != tiny.engine.info.digest
    assert driver.engine.info.digest == drive(weights="int8").engine.info.digest
    refused = driver.ask("abc", digest=tiny.engine.info.digest, max_tokens=1).failed
    assert refused.failure.code == DigestMismatch.code


def test_unknown_forms_of_weights_are_refused(drive):
    with pytest.raises(SettingInvalid, match="int7"):
        drive(weights="int7")
