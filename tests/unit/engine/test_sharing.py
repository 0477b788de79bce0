"""Prefixes are computed once a tenant, memory is taken as rows grow, and tiers come in order."""

from __future__ import annotations

import pytest

from fabric.engine.costs import StepCosts
from fabric.messages import Token

PREFIX = [(7 * i) % 250 for i in range(100)]  # six full blocks and a part
NEW = 12


def cached(heard):
    return heard.finished.usage.cached_prompt_tokens


def test_a_tenants_second_request_reuses_the_full_blocks_of_its_prefix(drive):
    driver = drive()
    cold = driver.greedy([*PREFIX, 1], NEW, cache_salt="a")
    assert cached(cold) == 0
    warm = driver.greedy([*PREFIX, 2], NEW, cache_salt="a")
    assert cached(warm) == 96
    assert warm.ids() == driver.greedy([*PREFIX, 2], NEW).wait().ids()
    load = driver.engine.load()
    assert load.prefix_found_tokens == 96
    assert load.prefix_queried_tokens > 96


def test_the_same_prompt_again_still_runs_its_last_token(drive):
    driver = drive()
    ids = PREFIX[:96]
    first = driver.greedy(ids, NEW, cache_salt="a").wait().ids()
    again = driver.greedy(ids, NEW, cache_salt="a")
    assert cached(again) == 80
    assert again.ids() == first


def test_an_answer_is_part_of_the_next_turns_prefix(drive):
    driver = drive()
    first = driver.greedy(PREFIX, 40, cache_salt="a", ignore_eos=True).wait()
    turn = [*PREFIX, *first.ids(), 5, 6]
    assert cached(driver.greedy(turn, 4, cache_salt="a")) == 128


@pytest.mark.parametrize("salts", [("a", "b"), ("a", ""), ("", "")])
def test_tenants_share_nothing(drive, salts):
    driver = drive()
    one, two = (driver.greedy(PREFIX, 2, cache_salt=salt).wait() for salt in salts)
    assert cached(two) == 0
    assert one.ids() == two.ids()


def test_rows_that_run_share_blocks_without_copies(drive, wait_until):
    driver = drive()
    driver.greedy(PREFIX, 1, cache_salt="a").wait()
    heard = [driver.greedy([*PREFIX, i], 120, cache_salt="a", ignore_eos=True) for i in range(8)]
    wait_until(lambda: all(h.tokens() for h in heard))
    total = driver.engine.info.limits.cache_tokens
    used = driver.engine.load().cache_usage * total
    for h in heard:
        assert cached(h) == 96
    assert used < 8 * 224 - 7 * 96 + 8 * 16
    wait_until(lambda: driver.engine.load().cache_usage == 0.0)


def test_scored_prompts_are_run_whole(drive):
    driver = drive()
    driver.greedy(PREFIX, 1, cache_salt="a").wait()
    scored = driver.greedy(PREFIX, 1, cache_salt="a", prompt_logprobs=True)
    assert cached(scored) == 0
    assert scored.finished
    assert len(scored.scored.tokens) == len(PREFIX)


def test_what_a_poisoned_row_computed_is_found_by_nobody(drive):
    driver = drive()
    expected = driver.greedy(PREFIX, NEW).wait().ids()

    def spoil(module, args, output):
        output[args[0] == PREFIX[3]] = float("nan")
        return output

    hook = driver.model.get_input_embeddings().register_forward_hook(spoil)
    assert driver.greedy(PREFIX, NEW, cache_salt="a").failed.failure.code == "row_failed"
    hook.remove()
    healed = driver.greedy(PREFIX, NEW, cache_salt="a")
    assert cached(healed) == 0
    assert healed.ids() == expected


def test_a_request_without_a_limit_does_not_reserve_the_context(drive):
    driver = drive(cache_bytes=2**18)  # 256 tokens, less than two contexts
    ids = [1, 2, 3]
    heard = [driver.ask(ids, temperature=0.0, ignore_eos=True, max_tokens=None) for _ in range(3)]
    short = driver.greedy(ids, 3, ignore_eos=True).wait()
    assert not heard[-1].ended.is_set()
    assert len(short.ids()) == 3
    answers = [h.wait() for h in heard]
    assert all(answer.finished.finish_reasons == ("length",) for answer in answers)
    assert len({tuple(answer.ids()) for answer in answers}) == 1
    assert driver.engine.load().num_preempted > 0


@pytest.mark.parametrize(("choices", "cache_bytes"), [(1, 2**18), (3, 2**19)])
def test_preempted_rows_give_the_tokens_they_would_have_given(
    drive, tiny, wait_until, choices, cache_bytes
):
    how = {"temperature": 0.0, "max_tokens": 100, "n": choices, "ignore_eos": True}
    prompts = [[i, *PREFIX[:37]] for i in range(4)]
    expected = [tiny.ask(ids, **how).wait() for ids in prompts]
    driver = drive(cache_bytes=cache_bytes)
    heard = [driver.ask(ids, **how) for ids in prompts]
    for one, other in zip(heard, expected, strict=True):
        assert one.finished.usage.output_tokens == 100 * choices
        for choice in range(choices):
            assert one.ids(choice) == other.ids(choice)
    assert driver.engine.load().num_preempted > 0
    wait_until(lambda: driver.engine.load().cache_usage == 0.0)


def test_choices_branch_off_rightly_when_one_token_of_the_prompt_runs_alone(drive, tiny):
    driver = drive(max_rows=4, step_tokens=37)
    ids = PREFIX[:38]
    how = {"temperature": 1.0, "seed": 3, "max_tokens": 9, "n": 3, "ignore_eos": True}
    one, other = driver.ask(ids, **how).wait(), tiny.ask(ids, **how).wait()
    assert [one.ids(c) for c in range(3)] == [other.ids(c) for c in range(3)]


def test_a_preempted_prompt_is_scored_once(drive):
    driver = drive(cache_bytes=2**18, step_tokens=17)
    first = driver.greedy([1], 150, ignore_eos=True)
    scored = driver.greedy(PREFIX * 2, 1, prompt_logprobs=True)
    assert scored.finished
    assert len(scored.scored.tokens) == 2 * len(PREFIX)
    assert len(first.wait().ids()) == 150


def test_an_interactive_request_passes_waiting_and_running_batch_work(drive, wait_until):
    driver = drive(max_rows=2)
    batch = [driver.greedy([i], 200, ignore_eos=True, tier="batch") for i in range(4)]
    wait_until(lambda: len(batch[1].tokens()) > 2)
    quick = driver.greedy([9], 5, ignore_eos=True, tier="interactive").wait()
    assert sum(h.ended.is_set() for h in batch) < 2
    assert len(quick.ids()) == 5
    for h in batch:
        assert len(h.wait().ids()) == 200


def test_batch_work_is_not_starved_by_a_stream_of_interactive_requests(drive):
    driver = drive(max_rows=1)
    batch = driver.greedy([1], 100, ignore_eos=True, tier="batch", deadline_s=4.0)
    # It is due half a deadline after it came; whoever comes later than that waits for it.
    interactive = []
    while not batch.ended.is_set() and len(interactive) < 5000:
        interactive.append(driver.greedy([2], 3, ignore_eos=True, tier="interactive").wait())
    assert batch.finished.usage.output_tokens == 100


def test_decoding_goes_on_while_a_long_prompt_arrives(drive, heard):
    driver = drive(step_tokens=40)
    order = []
    mark = lambda name: heard(lambda e: order.append(name) if isinstance(e, Token) else None)  # noqa: E731
    short = driver.greedy([1], 60, ignore_eos=True, heard=mark("short"))
    long = driver.greedy([3] * 240, 2, ignore_eos=True, heard=mark("long"))
    assert short.finished
    assert long.finished
    assert order.index("long") >= 5


def test_seconds_of_requests_sum_to_the_seconds_of_steps(drive, wait_until):
    driver = drive()
    heard = [driver.greedy(PREFIX, 20, ignore_eos=True) for _ in range(5)]
    total = sum(h.finished.usage.device_s for h in heard)
    wait_until(lambda: driver.engine.load().num_running == 0)
    assert total == pytest.approx(driver.engine.load().busy_s, rel=1e-6)


def test_costs_follow_the_median_and_rise_with_size():
    costs = StepCosts()
    assert costs.predict(0) == 0.0
    assert costs.predict(100) > costs.predict(1) > 0.0
    for seconds in (0.01, 0.01, 9.0):
        costs.add(1, seconds)
    for size, seconds in ((16, 0.02), (100, 0.1), (512, 0.5)):
        costs.add(size, seconds)
    assert costs.predict(1) == pytest.approx(0.01)
    assert costs.predict(58) == pytest.approx(0.06)
    assert costs.predict(1024) == pytest.approx(1.0)
    assert costs.largest(0.06, least=16, most=512) == 58
    assert costs.largest(0.0, least=16, most=512) == 16
    assert costs.largest(99.0, least=16, most=512) == 512
