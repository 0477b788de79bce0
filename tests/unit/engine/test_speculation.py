"""Speculation changes how fast tokens come, and nothing else."""

from __future__ import annotations

import pytest
import torch

from fabric.engine.rows import Grams
from fabric.errors import ModelNotLoadable

LOOP = [5, 9, 12, 40, 41] * 8
PROMPTS = [LOOP, [7] * 30, [(3 * i) % 200 for i in range(50)], list(b"a cat and a cat and a ")]
HOWS = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 0.8, "seed": 3},
    "narrow": {"temperature": 1.0, "seed": 4, "top_p": 0.9, "top_k": 20, "min_p": 0.01},
    "penalised": {
        "temperature": 0.5, "seed": 5, "repetition_penalty": 1.05, "frequency_penalty": 0.2,
        "logit_bias": {7: 2.0},
    },
    "choices": {"temperature": 0.7, "seed": 6, "n": 3},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _always_guess(monkeypatch):
    """Tiny models gain nothing by guessing: let every guess pay."""
    monkeypatch.setattr("fabric.engine.speculation._LEAST_GAIN", 0.0)


@pytest.fixture(scope="module")
def draft_dir(save_model, tiny_llama):
    """A draft model that often agrees: the target with a little noise."""
    model = tiny_llama()
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.02 * weight.std() * torch.randn_like(weight)
    return save_model(model)


@pytest.fixture(scope="module", params=["lookup", "model"])
def guessing(request, drive, draft_dir):
    """The tiny model with guesses, by either drafter."""
    if request.param == "model":
        return drive(speculation="model", draft_model=str(draft_dir))
    return drive(speculation="lookup")


@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS.keys())
def test_the_tokens_are_those_of_a_run_without_guesses(tiny, guessing, how):
    asked = {"max_tokens": 40, "ignore_eos": True, "logprobs": 2, **how}
    plain = [tiny.ask(prompt, **asked).wait() for prompt in PROMPTS]
    together = [guessing.ask(prompt, **asked) for prompt in PROMPTS]
    for expected, heard in zip(plain, together, strict=True):
        assert heard.finished.finish_reasons == expected.finished.finish_reasons
        for choice in range(how.get("n", 1)):
            assert heard.ids(choice) == expected.ids(choice)
            assert heard.text(choice) == expected.text(choice)
            assert [t.logprob for t in heard.tokens(choice)] == pytest.approx(
                [t.logprob for t in expected.tokens(choice)], abs=1e-4
            )
    load = guessing.engine.load()
    assert 0 < load.accepted_tokens <= load.drafted_tokens


def test_a_repeating_answer_takes_fewer_steps_than_tokens(guessing):
    heard = guessing.greedy(LOOP, 100, ignore_eos=True)
    usage = heard.finished.usage
    assert usage.output_tokens == 100 == len(heard.ids())
    assert usage.accepted_tokens > 10
    assert usage.drafted_tokens >= usage.accepted_tokens


def test_guesses_stop_where_the_answer_stops(tiny, guessing):
    whole = tiny.greedy(LOOP, 60, ignore_eos=True).wait()
    stop = whole.text()[20:23]
    for how in ({"stop": (stop,)}, {}):
        plain = tiny.greedy(LOOP, 60, ignore_eos=True, **how)
        heard = guessing.greedy(LOOP, 60, ignore_eos=True, **how)
        assert heard.finished.finish_reasons == plain.finished.finish_reasons
        assert (heard.ids(), heard.text()) == (plain.ids(), plain.text())


@pytest.mark.parametrize("left", [1, 2, 3])
def test_guesses_never_pass_the_limit_or_the_context(tiny, guessing, left):
    prompt = [7] * (tiny.engine.info.limits.context_tokens - left)
    heard = guessing.greedy(prompt, ignore_eos=True, max_tokens=left)
    assert heard.finished.usage.output_tokens == left
    assert heard.ids() == tiny.greedy(prompt, left, ignore_eos=True).wait().ids()


def test_constrained_answers_are_the_same(tiny, guessing):
    for constraint in (
        {"kind": "regex", "pattern": "(ab|cd){1,12}x"},
        {"kind": "json_schema", "definition": '{"type": "array", "items": {"type": "integer"}}'},
        {"kind": "choices", "texts": ("mitochondria", "mitochondrion")},
    ):
        for how in ({"temperature": 0.0}, {"temperature": 1.0, "seed": 2}):
            asked = {"constraint": constraint, "max_tokens": 40, **how}
            plain = tiny.ask(list(b"ababab mitochondria abab [1, 2, 1, 2"), **asked)
            heard = guessing.ask(list(b"ababab mitochondria abab [1, 2, 1, 2"), **asked)
            assert heard.finished.finish_reasons == plain.finished.finish_reasons
            assert heard.ids() == plain.ids()


def test_preempted_rows_give_the_same_tokens(tiny, drive, wait_until):
    driver = drive(cache_bytes=2**18, speculation="lookup")
    expected = [tiny.greedy([i, *LOOP], 100, ignore_eos=True).wait().ids() for i in range(4)]
    heard = [driver.greedy([i, *LOOP], 100, ignore_eos=True) for i in range(4)]
    assert [h.wait().ids() for h in heard] == expected
    wait_until(lambda: driver.engine.load().cache_usage == 0.0)
    load = driver.engine.load()
    assert load.num_preempted > 0
    assert load.accepted_tokens > 0


def test_only_accepted_tokens_are_found_by_the_next_request(tiny, guessing):
    first = guessing.greedy(LOOP, 60, ignore_eos=True, cache_salt="a").wait()
    turn = [*LOOP, *first.ids(), 5, 6]
    second = guessing.greedy(turn, 20, cache_salt="a")
    assert second.finished.usage.cached_prompt_tokens == (len(LOOP) + 59) // 16 * 16
    assert second.ids() == tiny.greedy(turn, 20).wait().ids()
    assert second.ids() == guessing.greedy(turn, 20).wait().ids()


def test_resuming_after_a_prefix_goes_on_the_same(tiny, guessing):
    whole = tiny.ask(LOOP, temperature=0.6, seed=9, max_tokens=40, ignore_eos=True).wait().ids()
    rest = guessing.ask(
        LOOP, temperature=0.6, seed=9, max_tokens=40, ignore_eos=True, prefix=tuple(whole[:11])
    )
    assert rest.wait().ids() == whole[11:]


def test_a_guess_that_gives_nan_costs_its_row_nothing(tiny, drive):
    driver = drive(speculation="lookup")
    prompt = [*[5, 9, 12, 250] * 6, 5, 9, 12]
    expected = tiny.greedy(prompt, 30, ignore_eos=True).wait().ids()
    assert 250 not in expected

    def spoil(module, args, output):
        (ids,) = args
        # The prompt runs in one chunk; 250 anywhere else is a guess.
        if ids.shape[1] < len(prompt):
            output[ids == 250] = float("nan")
        return output

    hook = driver.model.get_input_embeddings().register_forward_hook(spoil)
    try:
        heard = driver.greedy(prompt, 30, ignore_eos=True)
        assert heard.wait().ids() == expected
        assert heard.finished.usage.drafted_tokens > 0
    finally:
        hook.remove()
    assert driver.greedy(prompt, 30, ignore_eos=True).wait().ids() == expected


def test_seconds_of_requests_with_guesses_sum_to_those_of_steps(drive, draft_dir, wait_until):
    driver = drive(speculation="model", draft_model=str(draft_dir))
    heard = [driver.greedy(prompt, 20, ignore_eos=True) for prompt in PROMPTS]
    total = sum(h.finished.usage.device_s for h in heard)
    wait_until(lambda: driver.engine.load().num_running == 0)
    assert total == pytest.approx(driver.engine.load().busy_s, rel=1e-6)


def test_a_draft_model_with_other_tokens_is_refused(drive, save_model, tiny_llama, tmp_path):
    short = save_model(tiny_llama(max_position_embeddings=64))
    with pytest.raises(ModelNotLoadable, match="shorter than the 256"):
        drive(speculation="model", draft_model=str(short))
    large = save_model(tiny_llama(vocab_size=300))
    with pytest.raises(ModelNotLoadable, match="embeds 300 tokens"):
        drive(speculation="model", draft_model=str(large))
    with pytest.raises(ModelNotLoadable, match="there is no"):
        drive(speculation="model", draft_model=str(tmp_path / "none"))


def test_grams_find_what_followed_the_last_time():
    grams = Grams()
    tokens = [1, 2, 3, 4, 1, 2, 3, 5, 9]
    assert grams.find(tokens) is None
    tokens += [1, 2, 3]
    assert grams.find(tokens) == 7
    tokens += [5]
    assert grams.find(tokens) == 8
