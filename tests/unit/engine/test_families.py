"""Every family gives transformers' tokens: alone, and in a batch with long and short rows."""

from __future__ import annotations

import pytest
import torch

from fabric.engine.model import load_model
from fabric.engine.source import ModelSource
from fabric.testing.families import FAMILIES

PROMPTS = [
    [3],
    [(5 * i) % 250 for i in range(70)],
    [7, 8, 9] * 9,
    [(i * i) % 250 for i in range(33)],
]
NUM_NEW = 16


def generate(model, ids):
    out = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=NUM_NEW,
        do_sample=False,
    )
    return out[0, len(ids) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_generate_alone_and_mixed(family, save_model, drive):
    torch.manual_seed(3)
    model = FAMILIES[family]().eval()
    driver = drive(save_model(model))
    expected = [generate(model, ids) for ids in PROMPTS]
    assert [
        driver.greedy(ids, NUM_NEW, ignore_eos=True).wait().ids() for ids in PROMPTS
    ] == expected
    heard = [driver.greedy(ids, NUM_NEW, ignore_eos=True) for ids in PROMPTS]
    assert [h.wait().ids() for h in heard] == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_are_the_mean_of_the_last_hidden_states(family, save_model, drive):
    torch.manual_seed(3)
    model = FAMILIES[family]().eval()
    driver = drive(save_model(model))
    model.set_attn_implementation("eager")  # the others leave capped scores out
    for ids, heard in [(ids, driver.embed(ids)) for ids in PROMPTS]:
        with torch.inference_mode():
            hidden = model.base_model(torch.tensor([ids])).last_hidden_state[0]
        expected = torch.nn.functional.normalize(hidden.mean(0), dim=0)
        assert heard.vector == pytest.approx(expected.tolist(), abs=1e-5)


LAYOUTS = {
    "tensor": {"tensor_parallel": 2},
    "stages": {"pipeline_parallel": 2},
    "both": {"tensor_parallel": 2, "pipeline_parallel": 2},
}
DIVIDED = [(family, layout) for family in FAMILIES for layout in ("tensor", "stages")]
DIVIDED += [(family, "both") for family in ("llama", "gpt2", "gemma3, windows", "mixtral")]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("family", "layout"), DIVIDED)
def test_a_model_divided_among_processes_is_the_same_model(family, layout, save_model, drive):
    torch.manual_seed(3)
    model = FAMILIES[family]().eval()
    path = save_model(model)
    driver = drive(path, **LAYOUTS[layout])
    expected = [generate(model, ids) for ids in PROMPTS]
    heard = [driver.greedy(ids, NUM_NEW, ignore_eos=True) for ids in PROMPTS]
    assert [h.wait().ids() for h in heard] == expected
    assert driver.greedy(PROMPTS[1], NUM_NEW, ignore_eos=True).wait().ids() == expected[1]
    assert (
        driver.engine.info.digest
        == load_model(ModelSource.parse(str(path)), name="whole", dtype="float32").digest
    )
    ids = PROMPTS[3]
    scored = driver.ask(ids, max_tokens=0, prompt_logprobs=True).wait().scored.tokens
    model.set_attn_implementation("eager")  # the others leave capped scores out
    with torch.inference_mode():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        hidden = model.base_model(torch.tensor([ids])).last_hidden_state[0]
    for position, token in enumerate(scored[1:]):
        exact = float(logprobs[position, ids[position + 1]])
        assert token.logprob == pytest.approx(exact, abs=1e-4)
    vector = torch.nn.functional.normalize(hidden.mean(0), dim=0)
    assert driver.embed(ids).vector == pytest.approx(vector.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("family", "layout"),
    [("llama", None), ("llama", "both"), ("qwen2, biases", None), ("qwen2, biases", "tensor"),
     ("mixtral", None)],
)  # fmt: skip
def test_packed_weights_and_fused_kernels_change_no_more_than_rounding(
    family, layout, save_model, drive
):
    torch.manual_seed(3)
    model = FAMILIES[family]()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    path = save_model(model.bfloat16().eval())
    ids = PROMPTS[1]
    with torch.inference_mode():
        exact = model.float()(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    driver = drive(path, dtype="bfloat16", **LAYOUTS.get(layout, {}))
    token = driver.ask(ids, max_tokens=1, logprobs=20).wait().tokens()[0]
    for top in token.top_logprobs:
        assert top.logprob == pytest.approx(float(exact[top.token_id]), abs=0.25)
