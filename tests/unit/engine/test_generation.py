"""What a task gets: the same tokens as transformers, whatever runs beside it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from fabric.messages import ChatInput, ChatMessage, TextInput

LONG = "The mitochondrion is the powerhouse of the cell, as every school child knows. " * 2
PROMPTS = ["a", "def f(x):\n    return x", LONG, "naïve café 🎉", "0123456789" * 4, "Ω"]


def generate(model, ids, max_tokens, **more):
    out = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=max_tokens,
        do_sample=False,
        **more,
    )
    return out[0, len(ids) :].tolist()


def ids_of(driver, prompt):
    return driver.texts.prompt_ids(TextInput(text=prompt))


def test_greedy_equals_generate_alone_and_together(tiny, reference):
    expected = [generate(reference, ids_of(tiny, prompt), 16) for prompt in PROMPTS]
    alone = [tiny.greedy(prompt, 16).wait().ids() for prompt in PROMPTS]
    together = [heard.wait().ids() for heard in [tiny.greedy(p, 16) for p in PROMPTS]]
    assert alone == expected
    assert together == expected


@pytest.mark.parametrize(("dtype", "distance"), [("bfloat16", 0.2), ("float16", 0.02)])
def test_an_engine_of_16_bits_runs_close_to_float32(tiny_dir, drive, tiny, dtype, distance):
    half = drive(tiny_dir, dtype=dtype)
    exact = tiny.ask(LONG, temperature=0.0, max_tokens=1, logprobs=0).wait().tokens()[0]
    heard = half.ask(LONG, temperature=0.0, max_tokens=8, logprobs=20, ignore_eos=True).wait()
    near = {top.token_id: top.logprob for top in heard.tokens()[0].top_logprobs}
    assert near[exact.token_id] == pytest.approx(exact.logprob, abs=distance)
    assert len(heard.tokens()) == 8
    assert half.engine.info.digest != tiny.engine.info.digest


def test_end_of_sequence_ends_the_row_as_generate_does(tiny, tiny_dir, drive, reference, tmp_path):
    ids = ids_of(tiny, LONG)
    free = generate(reference, ids, 16, eos_token_id=None)
    eos = next(t for i, t in enumerate(free) if i >= 3 and t not in free[:i])
    other = shutil.copytree(tiny_dir, tmp_path / "other")
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((other / name).read_text())
        (other / name).write_text(json.dumps(settings | {"eos_token_id": [eos, 257]}))
    driver = drive(other)

    stopped = driver.greedy(LONG, 16)
    assert stopped.finished.finish_reasons == ("stop",)
    assert stopped.ids() == generate(reference, ids, 16, eos_token_id=eos)
    assert stopped.tokens()[-1].text == ""
    assert stopped.tokens()[-1].finish_reason == "stop"
    ignoring = driver.greedy(LONG, 16, ignore_eos=True)
    assert ignoring.finished.finish_reasons == ("length",)
    assert ignoring.ids() == free


def test_chat_is_rendered_with_the_models_template(tiny):
    chat = ChatInput(messages=(ChatMessage(role="user", content="hi"),))
    rendered = tiny.ask(chat, temperature=0.0, max_tokens=8)
    plain = tiny.greedy("<start>user:hi<end><start>assistant:", 8)
    assert rendered.wait().ids() == plain.wait().ids()


def test_seeded_sampling_depends_on_nothing_but_the_request(tiny, tiny_dir, drive):
    how = {"temperature": 1.0, "top_p": 0.95, "seed": 11, "max_tokens": 20}
    alone = tiny.ask(LONG, **how).wait().ids()
    crowd = [tiny.ask(prompt, temperature=1.0, max_tokens=24) for prompt in PROMPTS]
    crowded = tiny.ask(LONG, **how).wait().ids()
    small_chunks = drive(tiny_dir, max_rows=2, step_tokens=7).ask(LONG, **how).wait().ids()
    other_seed = tiny.ask(LONG, **(how | {"seed": 12})).wait().ids()
    assert alone == crowded == small_chunks
    assert other_seed != alone
    assert all(heard.finished for heard in crowd)


def test_without_a_seed_each_request_draws_its_own(tiny):
    drawn = [tiny.ask(LONG, temperature=1.0, max_tokens=20) for _ in range(2)]
    assert drawn[0].wait().ids() != drawn[1].wait().ids()


@pytest.mark.parametrize("how", [{"temperature": 0.0}, {"temperature": 1.0, "seed": 5}])
@pytest.mark.parametrize("cut", [1, 7, 23])
def test_resuming_by_prefix_equals_the_uninterrupted_run(tiny, how, cut):
    whole = tiny.ask("déjà 🎉", max_tokens=24, ignore_eos=True, **how).wait()
    prefix = tuple(whole.ids()[:cut])
    rest = tiny.ask("déjà 🎉", max_tokens=24, ignore_eos=True, prefix=prefix, **how).wait()
    assert [*prefix, *rest.ids()] == whole.ids()
    assert [token.position for token in rest.tokens()] == list(range(cut, 24))
    assert "".join(t.text for t in whole.tokens()[:cut]) + rest.text() == whole.text()
    assert rest.finished.usage.output_tokens == 24 - cut


def test_resuming_a_complete_run_finishes_at_once(tiny):
    whole = tiny.greedy("abc", 5).wait()
    again = tiny.greedy("abc", 5, prefix=tuple(whole.ids()))
    assert again.finished.finish_reasons == whole.finished.finish_reasons
    assert again.tokens() == []


def test_choices_share_the_prompt_and_differ_by_their_number(tiny):
    ids = [(5 * i) % 250 for i in range(37)]  # its last cache block is partial
    how = {"temperature": 1.0, "seed": 3, "max_tokens": 20, "ignore_eos": True}
    three = tiny.ask(ids, n=3, **how)
    assert three.finished.usage.prompt_tokens == 37
    assert three.finished.usage.output_tokens == 60
    first, second, third = (three.ids(choice) for choice in range(3))
    assert first == tiny.ask(ids, **how).wait().ids()
    assert len({tuple(first), tuple(second), tuple(third)}) == 3
    greedy = tiny.ask(ids, n=3, temperature=0.0, max_tokens=20)
    assert greedy.wait().ids(2) == tiny.greedy(ids, 20).wait().ids()


def test_usage_and_order_of_events(tiny):
    heard = tiny.greedy("hello", 4)
    usage = heard.finished.usage
    assert [event.type for event in heard.events] == ["accepted", *["token"] * 4, "finished"]
    assert (usage.prompt_tokens, usage.output_tokens) == (5, 4)
    assert 0.0 < usage.device_s < 10.0
    assert heard.events[0].prompt_tokens == 5


def test_blocks_of_the_cache_are_counted_for_as_long_as_they_are_kept(tiny):
    one_block = tiny.greedy("a" * 4, 8, ignore_eos=True).finished.usage
    assert one_block.kv_block_s == pytest.approx(one_block.device_s)
    two_blocks = tiny.greedy("b" * 17, 8, ignore_eos=True).finished.usage
    assert two_blocks.kv_block_s == pytest.approx(2 * two_blocks.device_s)
    grows = tiny.greedy("c" * 12, 12, ignore_eos=True).finished.usage
    assert grows.device_s < grows.kv_block_s < 2 * grows.device_s


def test_no_limit_goes_to_the_end_of_the_context(tiny):
    heard = tiny.ask([1] * 200, temperature=0.0, ignore_eos=True)
    assert heard.finished.usage.output_tokens == tiny.engine.info.limits.context_tokens - 200
    exact = tiny.greedy([1] * 200, 56, ignore_eos=True)
    assert exact.wait().ids() == heard.ids()


def test_log_probabilities_equal_a_plain_forward(tiny, reference):
    ids = ids_of(tiny, LONG)
    heard = tiny.ask(LONG, temperature=0.7, seed=1, max_tokens=6, logprobs=3).wait()
    with torch.inference_mode():
        logits = reference(torch.tensor([ids + heard.ids()])).logits[0, len(ids) - 1 : -1]
    logprobs = torch.log_softmax(logits.float(), -1)
    for token, row in zip(heard.tokens(), logprobs, strict=True):
        assert token.logprob == pytest.approx(float(row[token.token_id]), abs=1e-4)
        best, best_ids = row.topk(3)
        assert [top.token_id for top in token.top_logprobs] == best_ids.tolist()
        assert [top.logprob for top in token.top_logprobs] == pytest.approx(best.tolist(), abs=1e-4)
    assert tiny.greedy(LONG, 2).wait().tokens()[0].logprob is None


def test_prompt_is_scored_without_generating(tiny, reference):
    ids = ids_of(tiny, LONG)
    heard = tiny.ask(LONG, temperature=0.0, max_tokens=0, prompt_logprobs=True, logprobs=2)
    assert heard.finished.finish_reasons == ("length",)
    assert [event.type for event in heard.events] == ["accepted", "prompt_scored", "finished"]
    with torch.inference_mode():
        logprobs = torch.log_softmax(reference(torch.tensor([ids])).logits[0].float(), -1)
    expected = [float(logprobs[i - 1, ids[i]]) for i in range(1, len(ids))]
    tokens = heard.scored.tokens
    assert [token.token_id for token in tokens] == ids
    assert tokens[0].logprob is None
    assert [token.logprob for token in tokens[1:]] == pytest.approx(expected, abs=1e-4)
    assert tokens[1].top_logprobs[0].token_id == int(logprobs[0].argmax())
    assert "".join(token.text for token in tokens) == LONG


def test_prompt_scores_come_before_tokens_and_do_not_change_them(tiny):
    heard = tiny.greedy(LONG, 5, prompt_logprobs=True)
    assert [event.type for event in heard.wait().events] == [
        "accepted", "prompt_scored", *["token"] * 5, "finished",
    ]  # fmt: skip
    assert heard.ids() == tiny.greedy(LONG, 5).wait().ids()


def test_no_tokens_and_no_scores_is_nothing_to_run(tiny):
    heard = tiny.greedy("abc", 0)
    assert heard.finished.usage.device_s == 0.0
    assert heard.finished.finish_reasons == ("length",)


def test_two_engines_in_one_process_do_not_mix(tiny, drive, save_model, tiny_llama):
    torch.manual_seed(99)
    other = tiny_llama(num_hidden_layers=3, num_key_value_heads=4).eval()
    driver = drive(save_model(other))
    pairs = [(tiny.greedy(p, 12), driver.greedy(p, 12)) for p in PROMPTS]
    for prompt, (one, two) in zip(PROMPTS, pairs, strict=True):
        assert one.wait().ids() == tiny.greedy(prompt, 12).wait().ids()
        assert two.wait().ids() == generate(other, ids_of(driver, prompt), 12)
