"""Streams: order, reroutes, honest ends, cancellation."""

from __future__ import annotations

import pytest

from fabric.errors import RowFailed, StreamBroken
from fabric.sdk import Fabric
from fabric.testing.scripted_hub import (
    OURS,
    USAGE,
    ScriptedHub,
    chat_completion,
    chat_events,
    events,
    refusal,
    wait_for_client_to_leave,
)


def test_a_stream_yields_pieces_and_ends_with_the_result(hub: ScriptedHub, fabric: Fabric) -> None:
    hub.play(chat_events("Ju", "pi", "ter"))
    with fabric.stream_chat("Which?", model="toy") as stream:
        pieces = [chunk.text for chunk in stream]
    assert pieces == ["Ju", "pi", "ter", ""]
    assert stream.result.text == "Jupiter"
    assert stream.result.finish_reason == "stop"
    assert stream.result.charge_usu == 420
    assert hub.bodies[0]["stream_options"] == {"include_usage": True}


def test_the_place_is_known_before_the_end(hub: ScriptedHub, fabric: Fabric) -> None:
    hub.play(chat_events("Ju", done=False, then=wait_for_client_to_leave))
    with fabric.stream_chat("Which?", model="toy") as stream:
        next(stream)
        assert (stream.site, stream.reason) == ("alpha", "lowest expected cost")


def test_several_choices_are_kept_apart(hub: ScriptedHub, fabric: Fabric) -> None:
    def piece(index: int, text: str, end: str | None = None) -> object:
        logprobs = {"tokens": [text], "token_logprobs": [-0.5]}
        choice = {"index": index, "text": text, "finish_reason": end, "logprobs": logprobs}
        return {"choices": [choice]}

    hub.play(
        events(
            piece(0, "a"),
            piece(1, "x"),
            piece(0, "b", "stop"),
            piece(1, "y", "length"),
            {"model": "toy", "choices": [], "usage": USAGE, "fabric": OURS},
        )
    )
    with fabric.stream("p", model="toy", n=2, logprobs=0) as stream:
        assert [chunk.choice for chunk in stream] == [0, 1, 0, 1]
    assert [choice.text for choice in stream.result.choices] == ["ab", "xy"]
    assert [choice.finish_reason for choice in stream.result.choices] == ["stop", "length"]
    assert stream.result.choices[1].logprobs == {
        "tokens": ["x", "y"],
        "token_logprobs": [-0.5, -0.5],
    }


def test_a_reroute_is_announced_on_the_chunk_after_it(hub: ScriptedHub, fabric: Fabric) -> None:
    moved = {**OURS, "site": "beta", "attempts": 2, "because": "session_lost"}
    hub.play(
        events(
            {"choices": [{"index": 0, "text": "a"}], "fabric": OURS},
            {"choices": [{"index": 0, "text": "b", "finish_reason": "stop"}], "fabric": moved},
            {"model": "toy", "choices": [], "usage": USAGE, "fabric": moved},
        )
    )
    with fabric.stream("p", model="toy", seed=1) as stream:
        assert [chunk.because for chunk in stream] == [None, "session_lost"]
    assert (stream.result.site, stream.result.attempts) == ("beta", 2)


def test_a_stream_without_its_end_is_broken_and_not_sent_again(
    hub: ScriptedHub, fabric: Fabric
) -> None:
    hub.play(chat_events("Ju", "pi", done=False))
    with fabric.stream_chat("Which?", model="toy") as stream:
        with pytest.raises(StreamBroken, match="not the whole answer"):
            list(stream)
        assert stream.text == "Jupi"
        with pytest.raises(RuntimeError, match="no result yet"):
            _ = stream.result
    assert len(hub.paths) == 1


def test_an_error_in_a_stream_keeps_class_and_sentence(hub: ScriptedHub, fabric: Fabric) -> None:
    error = {"message": "It broke.", "type": "error", "param": None, "code": "row_failed"}
    hub.play(events({"choices": [{"index": 0, "text": "a"}]}, {"error": error}, done=False))
    with fabric.stream("p", model="toy") as stream, pytest.raises(RowFailed, match=r"It broke\."):
        list(stream)


def test_a_refused_stream_is_retried_before_its_first_byte(
    hub: ScriptedHub, fabric: Fabric
) -> None:
    hub.play(refusal("no_replica", "None yet.", 503), chat_events("ok"))
    with fabric.stream_chat("q", model="toy") as stream:
        assert "".join(chunk.text for chunk in stream) == "ok"


def test_an_answer_that_is_no_stream_is_not_taken_for_an_empty_one(
    hub: ScriptedHub, fabric: Fabric
) -> None:
    hub.play(chat_completion())
    with pytest.raises(Exception, match="answered 200 with application/json"):
        fabric.stream_chat("q", model="toy")


def test_closing_a_stream_closes_its_connection(hub: ScriptedHub, fabric: Fabric) -> None:
    hub.play(chat_events("a", done=False, then=wait_for_client_to_leave))
    with fabric.stream_chat("q", model="toy") as stream:
        assert next(stream).text == "a"
    assert hub.client_left.wait(20)


def test_a_stream_that_was_left_closes_its_connection(hub: ScriptedHub, fabric: Fabric) -> None:
    hub.play(chat_events("a", done=False, then=wait_for_client_to_leave))
    for _ in fabric.stream_chat("q", model="toy"):
        break
    assert hub.client_left.wait(20)
