"""Requests, errors and retries of the client, against a hub that misbehaves on demand."""

from __future__ import annotations

import copy
import socket
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from fabric.errors import (
    FabricError,
    HubUnreachable,
    InsufficientBalance,
    KeyInvalid,
    NoReplica,
    RequestInvalid,
    SettingInvalid,
    UnknownModel,
)
from fabric.sdk import AsyncFabric, Fabric
from fabric.testing.scripted_hub import (
    ScriptedHub,
    chat_completion,
    completion,
    hang_up,
    refusal,
    reply,
    wait_for_client_to_leave,
)


def test_an_answer_carries_its_text_place_cost_and_speed(hub: ScriptedHub, fabric: Fabric) -> None:
    hub.play(completion("four"))
    answer = fabric.complete("2+2=", model="toy", max_tokens=11)
    assert (answer.text, answer.site, answer.charge_usu) == ("four", "alpha", 420)
    assert answer.usage.completion_tokens == 11
    assert answer.tokens_per_s == pytest.approx(10 / (1.5 - 0.5))
    assert hub.paths == ["/v1/completions"]
    assert hub.headers[0]["authorization"] == "Bearer sk-test"


def test_options_of_the_fabric_travel_apart_from_openais(hub: ScriptedHub, fabric: Fabric) -> None:
    hub.play(completion())
    fabric.complete("x", model="toy", temperature=0, stop=["\n"], data_site="beta", deadline_s=9.0)
    assert hub.bodies == [
        {
            "prompt": "x",
            "model": "toy",
            "temperature": 0,
            "stop": ["\n"],
            "fabric": {"data_site": "beta", "deadline_s": 9.0},
        }
    ]


def test_a_question_is_sent_as_a_conversation(hub: ScriptedHub, fabric: Fabric) -> None:
    hub.play(chat_completion("Hello."))
    answer = fabric.chat("Hi", model="toy", logprobs=3)
    assert answer.message == {"role": "assistant", "content": "Hello."}
    assert hub.paths == ["/v1/chat/completions"]
    assert hub.bodies[0]["messages"] == [{"role": "user", "content": "Hi"}]
    assert (hub.bodies[0]["logprobs"], hub.bodies[0]["top_logprobs"]) == (True, 3)


def test_a_misspelt_option_is_refused_before_anything_is_sent(
    hub: ScriptedHub, fabric: Fabric
) -> None:
    with pytest.raises(TypeError, match="'max_token' is not an option"):
        fabric.complete("x", model="toy", max_token=3)  # type: ignore[call-arg]
    assert hub.paths == []


def test_the_hubs_only_model_needs_no_name(hub: ScriptedHub, fabric: Fabric) -> None:
    hub.play(reply({"data": [{"id": "toy"}]}), completion())
    fabric.complete("x")
    fabric.complete("y")
    assert hub.paths == ["/v1/models", "/v1/completions", "/v1/completions"]
    assert hub.bodies[1]["model"] == "toy"


def test_several_models_need_a_choice(hub: ScriptedHub, fabric: Fabric) -> None:
    hub.play(reply({"data": [{"id": "toy"}, {"id": "big"}]}))
    with pytest.raises(RequestInvalid, match="the hub has toy, big"):
        fabric.complete("x")


@pytest.mark.parametrize(
    ("code", "status", "error"),
    [
        ("model_not_found", 404, UnknownModel),
        ("insufficient_balance", 402, InsufficientBalance),
        ("invalid_api_key", 401, KeyInvalid),
        ("a_code_of_a_newer_hub", 418, FabricError),
    ],
)
def test_the_hubs_errors_keep_class_and_sentence(
    hub: ScriptedHub, fabric: Fabric, code: str, status: int, error: type[FabricError]
) -> None:
    hub.play(refusal(code, "A full sentence.", status, x_request_id="req_7"))
    with pytest.raises(error) as caught:
        fabric.complete("x", model="toy")
    assert caught.value.message == "A full sentence."
    assert caught.value.detail["request_id"] == "req_7"
    assert len(hub.paths) == 1


def test_an_error_survives_the_way_to_a_worker_and_back() -> None:
    error = UnknownModel(model="nope", known=["toy"])
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        again = pool.submit(copy.copy, error).result(timeout=60)
    assert again is not error
    assert type(again) is UnknownModel
    assert (again.message, again.detail) == (error.message, error.detail)


def test_a_retryable_refusal_is_sent_again_once(hub: ScriptedHub, fabric: Fabric) -> None:
    hub.play(refusal("no_replica", "None yet.", 503), completion())
    assert fabric.complete("x", model="toy").text == "four"
    assert len(hub.paths) == 2


def test_a_second_refusal_is_reported(hub: ScriptedHub, fabric: Fabric) -> None:
    hub.play(refusal("no_replica", "None yet.", 503))
    with pytest.raises(NoReplica):
        fabric.complete("x", model="toy")
    assert len(hub.paths) == 2


def test_retry_after_is_honoured(hub: ScriptedHub, fabric: Fabric) -> None:
    hub.play(refusal("too_many_requests", "Wait.", 429, retry_after="1"), completion())
    started = time.monotonic()
    fabric.complete("x", model="toy")
    assert time.monotonic() - started >= 1.0


def test_a_long_retry_after_is_reported_instead_of_waited_for(
    hub: ScriptedHub, fabric: Fabric
) -> None:
    hub.play(refusal("too_many_requests", "Wait.", 429, retry_after="3600"))
    with pytest.raises(FabricError) as caught:
        fabric.complete("x", model="toy")
    assert caught.value.detail["retry_after_s"] == 3600
    assert len(hub.paths) == 1


def test_no_retries_can_be_asked_for(hub: ScriptedHub) -> None:
    hub.play(refusal("no_replica", "None yet.", 503))
    with Fabric(hub.url, "sk", num_retries=0) as fabric, pytest.raises(NoReplica):
        fabric.complete("x", model="toy")
    assert len(hub.paths) == 1


def test_a_connection_closed_before_any_byte_is_tried_again(
    hub: ScriptedHub, fabric: Fabric
) -> None:
    hub.play(hang_up, completion())
    assert fabric.complete("x", model="toy").text == "four"


def test_a_hub_that_is_down_is_named_with_a_remedy() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with Fabric(url, "sk") as fabric, pytest.raises(HubUnreachable) as caught:
            fabric.complete("x", model="toy")
    assert url in caught.value.message
    assert "connection refused" in caught.value.message
    assert "`fabric up`" in caught.value.message


def test_a_hub_that_says_nothing_is_given_up_without_a_second_try(hub: ScriptedHub) -> None:
    hub.play(wait_for_client_to_leave)
    with (
        Fabric(hub.url, "sk", timeout_s=0.3) as fabric,
        pytest.raises(FabricError, match=r"sent nothing for 0\.3 s") as caught,
    ):
        fabric.complete("x", model="toy")
    assert caught.value.code == "deadline_exceeded"
    assert len(hub.paths) == 1


def test_another_kind_of_server_is_recognized(hub: ScriptedHub, fabric: Fabric) -> None:
    hub.play(reply({"detail": "Not Found"}, 404))
    with pytest.raises(HubUnreachable, match="answered 404 with application/json"):
        fabric.models()


@pytest.mark.parametrize("url", ["localhost:8642", "ftp://host", "http://", "http://[::"])
def test_an_address_that_is_none_names_the_setting(url: str) -> None:
    with Fabric(url, "sk") as fabric, pytest.raises(SettingInvalid, match=r"client\.base_url"):
        fabric.models()


def test_an_address_may_end_in_v1(hub: ScriptedHub) -> None:
    hub.play(completion())
    with Fabric(hub.url + "/v1/", "sk") as fabric:
        fabric.complete("x", model="toy")
    assert hub.paths == ["/v1/completions"]


def test_a_closed_client_says_so(hub: ScriptedHub) -> None:
    fabric = Fabric(hub.url, "sk")
    fabric.close()
    fabric.close()
    with pytest.raises(RuntimeError, match="client is closed"):
        fabric.complete("x", model="toy")


def test_a_notebook_shows_the_answer_escaped_with_its_place(
    hub: ScriptedHub, fabric: Fabric
) -> None:
    hub.play(completion("a < b"))
    html = fabric.complete("x", model="toy")._repr_html_()
    assert "a &lt; b" in html
    assert "<b>alpha</b>" in html
    assert "0.000420 SU" in html


async def test_the_same_client_runs_in_an_event_loop(hub: ScriptedHub) -> None:
    hub.play(completion())
    async with AsyncFabric(hub.url, "sk") as fabric:
        assert (await fabric.complete("x", model="toy")).text == "four"
