"""How tasks end early: cancelled, late, poisoned, too large, wrong; and that others go on."""

from __future__ import annotations

import threading
import time

import pytest
from pydantic import ValidationError

from fabric.messages import ChatInput, ChatMessage, Finished, Token


def cancel_after(driver, num_tokens):
    """A reaction to events that cancels the task at its n-th token."""

    def react(event):
        if isinstance(event, Token) and event.position == num_tokens - 1:
            driver.engine.cancel(event.task_id, event.attempt)

    return react


def test_cancelling_frees_the_row_within_one_step(tiny, heard, wait_until):
    listener = heard(cancel_after(tiny, 3))
    failed = tiny.greedy("abc", 200, ignore_eos=True, heard=listener).failed
    assert failed.failure.code == "request_cancelled"
    assert failed.usage.output_tokens == len(listener.tokens()) <= 4
    assert failed.usage.device_s > 0.0
    wait_until(lambda: tiny.engine.load().cache_usage == 0.0)
    assert tiny.engine.load().num_running == 0


def test_cancelling_a_waiting_or_unknown_task_harms_nobody(drive, wait_until):
    driver = drive(max_rows=1)
    running = driver.greedy("abc", 30, ignore_eos=True)
    waiting = driver.greedy("abc", 30, ignore_eos=True)
    wait_until(lambda: bool(waiting.events))
    driver.engine.cancel(waiting.events[0].task_id, 1)
    driver.engine.cancel("run_unknown", 1)
    assert waiting.failed.failure.code == "request_cancelled"
    assert waiting.tokens() == []
    assert len(running.wait().ids()) == 30


def test_a_sink_that_raises_loses_only_its_own_task(tiny, heard, wait_until, caplog):
    def react(event):
        if isinstance(event, Token):
            raise ConnectionError("gone")

    deaf = tiny.greedy("abc", 200, ignore_eos=True, heard=heard(react))
    other = tiny.greedy("abx", 10).wait()
    wait_until(lambda: tiny.engine.load().num_running == 0)
    assert len(deaf.tokens()) <= 2
    assert other.ids() == tiny.greedy("abx", 10).wait().ids()


def test_the_deadline_ends_a_task_with_what_it_used(tiny):
    failed = tiny.greedy("abc", 240, ignore_eos=True, deadline_s=0.05).failed
    assert failed.failure.code == "deadline_exceeded"
    assert failed.usage.output_tokens < 240


def test_a_poisoned_row_ends_alone(drive):
    """NaN in one row's activations, by a hook on a real module, and only in that row's."""
    driver = drive()
    prompts = ["one fish", "two fish", "red fish", "blue fish"]
    clean = [driver.greedy(prompt, 20).wait().ids() for prompt in prompts]
    poison = 258
    assert not any(poison in ids for ids in clean)

    def spoil(module, args, output):
        (ids,) = args
        output[ids == poison] = float("nan")
        return output

    hook = driver.model.get_input_embeddings().register_forward_hook(spoil)
    try:
        heard = [driver.greedy(prompt, 20) for prompt in prompts[:2]]
        bad = driver.greedy([1, 2, poison, 3], 20)
        heard += [driver.greedy(prompt, 20) for prompt in prompts[2:]]
        failure = bad.failed.failure
        ids = [h.wait().ids() for h in heard]
    finally:
        hook.remove()
    assert failure.code == "row_failed"
    assert ids == clean
    # The cache blocks it used are given to others now, and hold no NaN.
    assert [driver.greedy(prompt, 20).wait().ids() for prompt in prompts] == clean


def test_poison_that_nobody_saw_does_not_stay_in_the_cache(drive, heard):
    driver = drive(step_tokens=17)
    expected = driver.greedy("abc", 6).wait().ids()

    def spoil(module, args, output):
        output[args[0] == 77] = float("nan")
        return output

    def cancel_at_once(event):
        driver.engine.cancel(event.task_id, event.attempt)

    hook = driver.model.get_input_embeddings().register_forward_hook(spoil)
    bad = driver.greedy([77] * 60, 1, heard=heard(cancel_at_once)).failed
    hook.remove()
    assert bad.failure.code == "request_cancelled"
    assert bad.usage.device_s > 0.0
    assert driver.greedy("abc", 6).wait().ids() == expected


def test_a_step_that_raises_fails_its_tasks_and_the_engine_goes_on(drive, caplog):
    driver = drive()
    expected = driver.greedy("abc", 8).wait().ids()

    def explode(module, args, output):
        raise RuntimeError("out of memory")

    hook = driver.model.lm_head.register_forward_hook(explode)
    failed = driver.greedy("abc", 8).failed
    hook.remove()
    assert failed.failure.code == "engine_error"
    assert "out of memory" in failed.failure.message
    assert driver.greedy("abc", 8).wait().ids() == expected


@pytest.mark.parametrize(
    ("sampling", "code"),
    [
        ({"max_tokens": 300}, "context_length_exceeded"),
        ({"max_tokens": 254}, "context_length_exceeded"),
        ({"max_tokens": 200, "n": 16}, "cache_exhausted"),
    ],
)
def test_what_can_never_fit_is_refused_at_once(drive, sampling, code):
    driver = drive(cache_bytes=2**20)
    failed = driver.ask("abc", **sampling).failed
    assert failed.failure.code == code
    assert failed.failure.detail
    assert driver.greedy("abc", 253).finished


def test_a_prompt_as_long_as_the_context_can_be_scored_but_not_continued(tiny):
    full = [1] * tiny.engine.info.limits.context_tokens
    assert tiny.ask(full, max_tokens=0, prompt_logprobs=True).finished
    assert tiny.ask(full).failed.failure.code == "context_length_exceeded"
    assert tiny.ask("x" * 10**6).failed.failure.code == "context_length_exceeded"


def test_tasks_that_outgrow_the_cache_are_computed_again_in_order(drive, heard, wait_until):
    driver = drive(cache_bytes=2**18)
    order = []
    listeners = [
        heard(lambda event, i=i: order.append(i) if isinstance(event, Finished) else None)
        for i in range(4)
    ]
    for listener in listeners:
        driver.greedy("abc", 150, ignore_eos=True, heard=listener)
    for listener in listeners:
        assert listener.finished
    assert order == [0, 1, 2, 3]
    assert len({tuple(listener.ids()) for listener in listeners}) == 1
    assert driver.engine.load().num_preempted > 0
    wait_until(lambda: driver.engine.load().cache_usage == 0.0)


@pytest.mark.parametrize(
    ("prompt", "more", "code"),
    [
        ([259], {}, "invalid_parameter"),
        ("", {}, "invalid_parameter"),
        ("\ud800", {}, "invalid_parameter"),
        ("abc", {"prefix": (1,), "n": 2}, "invalid_parameter"),
        ("abc", {"prefix": (1,), "temperature": 1.0}, "invalid_parameter"),
        ("abc", {"prefix": (999,), "temperature": 0.0}, "invalid_parameter"),
        ("abc", {"digest": "blake3:00"}, "digest_mismatch"),
    ],
)
def test_bad_input_fails_with_its_code_and_never_raises(tiny, prompt, more, code):
    heard = tiny.ask(prompt, **more).wait()
    assert [event.type for event in heard.events] == ["failed"]
    assert heard.failed.failure.code == code


def test_a_vocabulary_of_stop_strings_is_refused_and_the_most_of_them_are_served(tiny):
    with pytest.raises(ValidationError, match="at most 16"):
        tiny.ask("abc", stop=[f"stop {i}" for i in range(49_152)])
    stops = [chr(ord("a") + i) * 256 for i in range(16)]
    heard = tiny.greedy("abc", 20, ignore_eos=True, stop=stops)
    assert heard.finished.usage.output_tokens == 20
    assert heard.text() == tiny.greedy("abc", 20, ignore_eos=True).wait().text()


def test_more_choices_than_rows_are_refused(drive):
    assert drive(max_rows=2).ask("abc", n=3).failed.failure.code == "invalid_parameter"


def test_a_conversation_the_template_refuses_is_invalid(tiny):
    turns = (ChatMessage(role="user", content="x"), ChatMessage(role="system", content="y"))
    failure = tiny.ask(ChatInput(messages=turns)).failed.failure
    assert failure.code == "invalid_parameter"
    assert "the system turn comes first" in failure.message


def test_the_same_attempt_twice_is_refused_the_second_time(tiny, heard):
    first = tiny.greedy("abc", 100, ignore_eos=True)
    second = heard()
    tiny.engine.submit(tiny.last_task, second)
    assert second.failed.failure.code == "invalid_parameter"
    assert len(first.wait().ids()) == 100


def test_closing_fails_what_is_there_and_what_comes_after(drive):
    driver = drive(max_rows=1)
    heard = [driver.greedy("abc", 250, ignore_eos=True) for _ in range(3)]
    driver.engine.close()
    driver.engine.close()
    late = driver.greedy("abc", 1)
    assert {h.failed.failure.code for h in [*heard, late]} == {"engine_stopped"}
    assert driver.engine.load().num_running == 0


def test_load_counts_rows_and_learns_rates(tiny):
    busy = [tiny.greedy("abc", 100, ignore_eos=True) for _ in range(3)]
    load = tiny.engine.load()
    assert load.num_running + load.num_waiting >= 1
    for heard in busy:
        heard.wait()
    load = tiny.engine.load()
    assert load.prefill_tokens_per_s > 0.0
    assert load.decode_tokens_per_s > 0.0
    phases = (load.prefill_steps, load.decode_steps, load.mixed_steps)
    assert load.prefill_steps.num > 0
    assert load.decode_steps.num > 50
    assert sum(steps.seconds for steps in phases) == pytest.approx(load.busy_s)


def test_an_idle_engine_uses_no_processor_time(tiny):
    tiny.greedy("abc", 2).wait()
    before = time.process_time()
    threading.Event().wait(0.5)
    assert time.process_time() - before < 0.1
