"""Embeddings from the official client, the SDK and the command line to an engine and back."""

from __future__ import annotations

import base64
import json
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import openai
import pytest
from click.testing import CliRunner
from openai import OpenAI

from fabric.broker import BrokerSettings
from fabric.cli.main import fabric as fabric_command
from fabric.errors import FabricError, NoReplica
from fabric.messages import Limits, Request, TextInput
from fabric.sdk import Fabric
from fabric.testing.engine import DIMENSIONS, FixedDelayEngine, embed
from fabric.testing.hub import PROJECT, RunningHub, running_hub, wait_until


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHub]:
    with running_hub(tmp_path_factory.mktemp("hub"), sites=["alpha"]) as hub:
        yield hub


@pytest.fixture
def client(hub: RunningHub) -> Iterator[OpenAI]:
    with OpenAI(base_url=hub.openai_url, api_key=hub.api_key, max_retries=0, timeout=20) as client:
        yield client


def expected(text: str) -> list[float]:
    numbers = embed(Request(model="fixed", input=TextInput(text=text)))
    return list(struct.unpack(f"<{DIMENSIONS}f", struct.pack(f"<{DIMENSIONS}f", *numbers)))


def spent_usu(hub: RunningHub) -> int:
    """Return what has been charged once nothing is held any more."""
    wait_until(lambda: hub.ledger.allocations(PROJECT)[0].held_usu == 0, timeout_s=20)
    return 10**12 - hub.ledger.allocations(PROJECT)[0].available_usu


# ---- the OpenAI API ------------------------------------------------------------------------------


def test_each_text_comes_back_as_its_vector_in_order_and_is_charged_once(
    client: OpenAI, hub: RunningHub
) -> None:
    before = spent_usu(hub)
    texts = ["one", "two words", "now three words"]
    reply = client.embeddings.create(model="fixed", input=texts)
    assert [one.index for one in reply.data] == [0, 1, 2]
    assert [one.embedding for one in reply.data] == [expected(text) for text in texts]
    assert (reply.usage.prompt_tokens, reply.usage.total_tokens) == (6, 6)
    ours = reply.model_extra["fabric"]
    assert (ours["charge_usu"], ours["sites"], len(set(ours["runs"]))) == (6, ["alpha"], 3)
    assert spent_usu(hub) == before + 6
    for run_id, tokens in zip(ours["runs"], (1, 2, 3), strict=True):
        run = hub.catalog.run(run_id, project=PROJECT)
        assert (run.usage.prompt_tokens, run.usage.output_tokens) == (tokens, 0)
        assert run.charge_usu == tokens


def test_both_encodings_hold_the_same_numbers(client: OpenAI, hub: RunningHub) -> None:
    plain, packed = (
        client.embeddings.with_raw_response.create(model="fixed", input="x", encoding_format=how)
        for how in ("float", "base64")
    )
    numbers = plain.http_response.json()["data"][0]["embedding"]
    data = packed.http_response.json()["data"][0]["embedding"]
    assert numbers == list(struct.unpack(f"<{DIMENSIONS}f", base64.b64decode(data)))
    assert np.linalg.norm(numbers) == pytest.approx(1.0, abs=1e-6)
    assert packed.headers["x-fabric-site"] == "alpha"


def test_token_ids_and_lists_of_them_are_texts_too(client: OpenAI) -> None:
    one = client.embeddings.create(model="fixed", input=[5, 6, 7])
    assert (len(one.data), one.usage.prompt_tokens) == (1, 3)
    two = client.embeddings.create(model="fixed", input=[[5, 6, 7], [8]])
    assert (len(two.data), two.usage.prompt_tokens) == (2, 4)
    assert two.data[0].embedding == one.data[0].embedding


def test_more_texts_than_the_key_may_run_at_once_are_answered(
    client: OpenAI, hub: RunningHub
) -> None:
    texts = [f"text {number}" for number in range(150)]
    reply = client.embeddings.create(model="fixed", input=texts)
    assert [one.embedding for one in reply.data] == [expected(text) for text in texts]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": []}, "input"),
        ({"input": ["a", 1]}, "input"),
        ({"input": [[1], []]}, "input"),
        ({"input": ["x"] * 2049}, "input"),
        ({"input": "x", "dimensions": 0}, "dimensions"),
        ({"input": "x", "dimensions": DIMENSIONS + 1}, "dimensions"),
        ({"input": "x", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "x", "extra_body": {"fabric": {"pooling": "sum"}}}, "fabric.pooling"),
        ({"input": "x", "extra_body": {"temperature": 1}}, "temperature"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    client: OpenAI, hub: RunningHub, body: dict, param: str
) -> None:
    before = spent_usu(hub)
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model="fixed", **body)
    assert caught.value.param == param
    assert spent_usu(hub) == before


def test_a_text_longer_than_the_context_is_refused_and_not_charged(
    client: OpenAI, hub: RunningHub
) -> None:
    before = spent_usu(hub)
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model="fixed", input=["short", "long " * 2049])
    assert caught.value.code == "context_length_exceeded"
    assert spent_usu(hub) <= before + 1  # the short one may have been answered by then


def test_the_models_own_dimensions_may_be_asked_for(client: OpenAI) -> None:
    reply = client.embeddings.create(model="fixed", input="x", dimensions=DIMENSIONS)
    assert len(reply.data[0].embedding) == DIMENSIONS


# ---- placement -----------------------------------------------------------------------------------


def engine_of(*modes: str) -> FixedDelayEngine:
    limits = Limits(context_tokens=2048, max_rows=8, cache_tokens=2**14, modes=modes)
    return FixedDelayEngine(limits=limits)


@contextmanager
def patient_for_nobody(tmp_path: Path, engine: FixedDelayEngine) -> Iterator[Fabric]:
    """Yield a client of a hub with one instance, which waits for no other."""
    patience = BrokerSettings(patience_s=0.1)
    with (
        running_hub(tmp_path, sites=["alpha"], engine=lambda: engine, broker=patience) as hub,
        Fabric(hub.base_url, hub.api_key, num_retries=0) as fabric,
    ):
        yield fabric


def test_an_instance_that_does_not_embed_is_excluded_with_that_reason(tmp_path: Path) -> None:
    with patient_for_nobody(tmp_path, engine_of("query")) as fabric:
        with pytest.raises(NoReplica) as caught:
            fabric.embed("x")
        assert list(caught.value.detail["reasons"].values()) == ["it does not embed"]


def test_an_instance_that_only_embeds_gets_no_prompts_to_continue(tmp_path: Path) -> None:
    with patient_for_nobody(tmp_path, engine_of("embed")) as fabric:
        with pytest.raises(NoReplica) as caught:
            fabric.complete("x", max_tokens=1)
        assert list(caught.value.detail["reasons"].values()) == ["it only embeds"]


def test_texts_go_past_the_instance_that_does_not_embed(tmp_path: Path) -> None:
    engines = iter([engine_of("query"), engine_of("query", "embed")])
    with (
        running_hub(tmp_path, sites=["alpha", "beta"], engine=lambda: next(engines)) as hub,
        Fabric(hub.base_url, hub.api_key) as fabric,
    ):
        assert fabric.embed([f"text {number}" for number in range(20)]).sites == ("beta",)


def test_a_lost_instance_costs_an_attempt_and_no_second_charge(tmp_path: Path) -> None:
    with (
        running_hub(tmp_path, engine=lambda: FixedDelayEngine(first_token_s=30.0)) as hub,
        Fabric(hub.base_url, hub.api_key) as fabric,
    ):
        answers: list = []
        asking = threading.Thread(target=lambda: answers.append(fabric.embed("three small words")))
        asking.start()
        wait_until(lambda: any(one.load().num_running for one in engines(hub)), timeout_s=20)
        busy = next(name for name, one in hub.sites.items() if one.engine.load().num_running)
        for site in hub.sites.values():
            site.engine.first_token_s = 0.0
        hub.kill_site(busy)
        asking.join(20)
        [answer] = answers
        assert answer.sites != (busy,)
        assert answer.vectors[0].tolist() == expected("three small words")
        assert spent_usu(hub) == 3
        assert hub.catalog.run(answer.run_ids[0], project=PROJECT).attempts == 2


def engines(hub: RunningHub) -> list[FixedDelayEngine]:
    return [site.engine for site in hub.sites.values()]


# ---- the SDK and the command line ----------------------------------------------------------------


def test_the_sdk_returns_vectors_usage_and_charge(hub: RunningHub) -> None:
    with Fabric(hub.base_url, hub.api_key) as fabric:
        answer = fabric.embed(["one", "two words"])
        assert (len(answer), answer.usage.prompt_tokens, answer.charge_usu) == (2, 3, 3)
        assert answer.model == "fixed@1"
        assert answer[1].tolist() == expected("two words")
        matrix = np.asarray(answer)
        assert (matrix.shape, matrix.dtype) == ((2, DIMENSIONS), np.float32)
        many = fabric.embed(["same"] * 300)
        assert len(many) == len(set(many.run_ids)) == 300
        with pytest.raises(ValueError, match="no texts"):
            fabric.embed([])
        with pytest.raises(TypeError, match="max_tokens"):
            fabric.embed("x", max_tokens=3)  # type: ignore[call-arg]
        with pytest.raises(FabricError, match=str(DIMENSIONS)):
            fabric.embed("x", dimensions=3)


def test_the_command_prints_a_vector_a_line(hub: RunningHub) -> None:
    flags = ["--base-url", hub.base_url, "--api-key", hub.api_key]
    result = CliRunner().invoke(fabric_command, ["embed", *flags], input="one\n\ntwo words\n")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [json.loads(line) for line in lines] == [expected("one"), expected("two words")]
    assert "alpha" in result.stderr
    assert "3 tokens" in result.stderr
