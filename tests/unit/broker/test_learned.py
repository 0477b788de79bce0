"""What the broker learns of answers and replicas, and what stands for what it does not know."""

from __future__ import annotations

from typing import Any

import pytest

from fabric.broker.cost import PRIOR_OUTPUT_TOKENS, expected_tokens, length_s
from fabric.broker.lengths import MIN_ANSWERS, Lengths
from fabric.broker.replicas import FRESH_S
from fabric.messages import Placed, Request, Sampling, TextInput
from fabric.testing.broker_rig import DIGEST, Rig, admit
from fabric.testing.choices import context


def asking(max_tokens: int | None) -> Request:
    sampling = Sampling(max_tokens=max_tokens)
    return Request(model="smol", input=TextInput(text="Why?"), sampling=sampling)


def test_answers_shorter_than_asked_for_are_expected_shorter() -> None:
    lengths = Lengths()
    for _ in range(MIN_ANSWERS):
        lengths.observe(4_000, 200)
        lengths.observe(None, 70)
    assert expected_tokens(asking(4_000), lengths)[1] == 200
    assert expected_tokens(asking(3_000), lengths)[1] == 150
    assert expected_tokens(asking(None), lengths)[1] == 70


def test_answers_longer_than_the_prior_are_expected_so() -> None:
    lengths = Lengths()
    for _ in range(MIN_ANSWERS):
        lengths.observe(600, 600)
    assert expected_tokens(asking(600), lengths)[1] == 600
    assert expected_tokens(asking(513), lengths)[1] == 513


def test_a_few_answers_change_no_expectation() -> None:
    lengths = Lengths()
    for _ in range(MIN_ANSWERS - 1):
        lengths.observe(600, 1)
    assert expected_tokens(asking(600), lengths)[1] == PRIOR_OUTPUT_TOKENS
    assert expected_tokens(asking(5), lengths)[1] == 5


@pytest.mark.parametrize("num", [11, 400])
def test_the_expected_share_follows_what_comes(num: int) -> None:
    lengths = Lengths()
    for _ in range(num):
        lengths.observe(100, 20)
    for _ in range(200):
        lengths.observe(100, 80)
    assert lengths.expected(100) == pytest.approx(80, abs=2)


def test_the_usual_length_follows_what_comes_for_each_version() -> None:
    lengths = Lengths()
    for _ in range(MIN_ANSWERS - 1):
        lengths.came("sha256:aa", 4.0)
    assert lengths.usual_s("sha256:aa") is None
    lengths.came("sha256:aa", 4.0)
    assert lengths.usual_s("sha256:aa") == pytest.approx(4.0)
    for _ in range(200):
        lengths.came("sha256:aa", 1.0)
    assert lengths.usual_s("sha256:aa") == pytest.approx(1.0, abs=0.01)
    assert lengths.usual_s("sha256:bb") is None


def test_every_admitted_request_tells_how_long_is_usual() -> None:
    rig, asked = Rig("alpha"), asking(100)
    for number in range(MIN_ANSWERS):
        rig.admit(f"run_{number}", sampling=asked.sampling)
    lengths = rig.state.experience.informed(rig.now, asked, context()).lengths
    assert lengths is not None
    assert lengths.usual_s(DIGEST) == pytest.approx(length_s(expected_tokens(asked)), rel=0.01)
    assert lengths.usual_s("sha256:bb") is None


def answer(rig: Rig, site: str, seconds: float) -> None:
    """Let a site answer four tokens, a quarter of the seconds apart."""
    sent = admit(rig, run_id=f"run_{len(rig.done)}", sites=(site,))
    for position in range(4):
        rig.tick(seconds / 4)
        rig.token(sent, position, "stop" if position == 3 else None)
    rig.finish(sent, 4)


def rates(rig: Rig) -> dict[str, float]:
    return {one.instance: one.decode_tokens_per_s for one in rig.state.fleet.snapshots(rig.now)}


def test_a_replica_nobody_asked_yet_does_what_is_usual_at_its_site_else_anywhere() -> None:
    rig = Rig("alpha", "beta")
    for _ in range(3):
        answer(rig, "alpha", 0.4)
        answer(rig, "beta", 4.0)
    rig.join("alpha", "alpha-2")
    rig.join("gamma")
    known = rates(rig)
    assert known["alpha-1"] == known["alpha-2"] == pytest.approx(10.0)
    assert known["beta-1"] == pytest.approx(1.0)
    assert known["beta-1"] < known["gamma-1"] < known["alpha-1"]


def test_a_replica_that_once_was_slow_is_later_taken_for_one_of_its_site() -> None:
    rig = Rig("alpha")
    rig.join("alpha", "alpha-2")
    slow = rig.state.fleet
    fields: dict[str, Any] = {"prompt_tokens": 9, "first_token_s": 0.1}
    for _ in range(9):
        slow.observed(rig.now, "alpha-1", decode_tokens_per_s=20.0, **fields)
    slow.observed(rig.now, "alpha-2", decode_tokens_per_s=0.5, **fields)
    assert rates(rig)["alpha-2"] == 0.5
    rig.tick(FRESH_S + 1.0)
    assert rates(rig)["alpha-2"] == rates(rig)["alpha-1"] > 10.0


def test_a_site_that_was_not_asked_for_a_while_is_remembered_as_it_was() -> None:
    rig = Rig("alpha", "beta", explore=0.0)
    for _ in range(3):
        answer(rig, "alpha", 0.04)
        answer(rig, "beta", 4.0)
    rig.tick(FRESH_S + 1.0)
    rig.done.clear()
    admit(rig, run_id="after")
    assert rig.emitted(Placed)[0].placement.site == "alpha"
