"""The client against a real hub with two sites, over each kind of database."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import as_completed
from functools import partial
from pathlib import Path
from uuid import uuid4

import pytest

from fabric.errors import (
    ContextExceeded,
    FabricError,
    InsufficientBalance,
    KeyInvalid,
    NotFound,
    PlacementError,
    RequestInvalid,
    RowFailed,
    StreamBroken,
    UnknownModel,
    UnknownSite,
)
from fabric.sdk import AsyncFabric, Fabric
from fabric.testing.engine import FixedDelayEngine, word
from fabric.testing.hub import HubOptions, RunningHub, running_hub, wait_until


def words(count: int) -> str:
    return "".join(word(position) for position in range(count))


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest) -> HubOptions:
    """Where hubs keep their books: a file of their own, or a database they find again."""
    if request.param == "sqlite":
        return {}
    return {"database_url": request.getfixturevalue("postgres").create(uuid4().hex)}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, database: HubOptions) -> Iterator[RunningHub]:
    engine = partial(FixedDelayEngine, token_s=0.005)
    with running_hub(tmp_path_factory.mktemp("hub"), engine=engine, **database) as hub:
        yield hub


@pytest.fixture
def fabric(hub: RunningHub) -> Iterator[Fabric]:
    with Fabric(hub.base_url, hub.api_key, timeout_s=30) as fabric:
        yield fabric


def running(hub: RunningHub) -> int:
    return sum(site.engine.load().num_running for site in hub.sites.values())


def test_an_answer_says_where_it_came_from_and_what_it_cost(
    hub: RunningHub, fabric: Fabric
) -> None:
    answer = fabric.complete("one two three", max_tokens=5)
    assert answer.text == words(5)
    assert answer.site in ("alpha", "beta")
    assert answer.instance == hub.sites[answer.site].instance
    assert answer.digest == hub.sites[answer.site].engine.info.digest
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 5)
    assert answer.charge_usu == 3 * 1 + 5 * 2
    assert answer.finish_reason == "length"
    assert answer.tokens_per_s is not None
    assert answer.tokens_per_s == pytest.approx(1 / 0.005, rel=0.5)


def test_a_conversation_goes_on(fabric: Fabric) -> None:
    first = fabric.chat("hello", max_tokens=2)
    turns = [{"role": "user", "content": "hello"}, first.message]
    second = fabric.chat([*turns, {"role": "user", "content": "and"}], max_tokens=2)
    assert second.usage.prompt_tokens > first.usage.prompt_tokens


def test_a_stream_is_a_chunk_a_token_and_equals_the_whole_answer(fabric: Fabric) -> None:
    with fabric.stream("a b", max_tokens=8, temperature=0) as stream:
        pieces = [chunk.text for chunk in stream if chunk.text]
    assert pieces == [word(position) for position in range(8)]
    assert stream.result.text == fabric.complete("a b", max_tokens=8, temperature=0).text
    assert stream.result.charge_usu == 2 * 1 + 8 * 2


def test_choices_and_log_probabilities_arrive_alike_in_both_forms(fabric: Fabric) -> None:
    whole = fabric.complete("a", max_tokens=3, n=2, logprobs=2)
    with fabric.stream("a", max_tokens=3, n=2, logprobs=2) as stream:
        list(stream)
    assert len(whole.choices) == 2
    assert stream.result.choices == whole.choices
    assert whole.choices[1].logprobs is not None
    assert whole.choices[1].logprobs["token_logprobs"] == [-0.5] * 3


def test_echo_scores_the_prompt(fabric: Fabric) -> None:
    answer = fabric.complete("a b c", max_tokens=0, echo=True, logprobs=0)
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs["token_logprobs"] == [None, -0.5, -0.5]


def test_forty_futures_come_back(fabric: Fabric) -> None:
    futures = [fabric.submit("a", max_tokens=4) for _ in range(40)]
    assert {future.result().text for future in as_completed(futures, 30)} == {words(4)}


def test_map_answers_in_order(fabric: Fabric) -> None:
    prompts = [" ".join("a" * count) for count in range(1, 30)]
    answers = fabric.map(prompts, max_tokens=1)
    assert [answer.usage.prompt_tokens for answer in answers] == list(range(1, 30))


def test_the_home_of_the_data_decides(fabric: Fabric) -> None:
    far = 5_000_000_000
    for site in ("alpha", "beta"):
        assert fabric.complete("a", max_tokens=1, data_site=site, data_bytes=far).site == site
        assert fabric.complete("a", max_tokens=1, sites=[site]).site == site


def test_explain_shows_all_candidates_and_charges_nothing(fabric: Fabric) -> None:
    before = fabric.usage().allocations
    placement = fabric.explain("a", data_site="beta", data_bytes=5_000_000_000)
    assert placement.site == "beta"
    assert {candidate.site for candidate in placement.candidates} == {"alpha", "beta"}
    assert fabric.usage().allocations == before


def test_the_hub_tells_of_itself(hub: RunningHub, fabric: Fabric) -> None:
    assert [(model.id, model.context_tokens) for model in fabric.models()] == [("fixed@1", 2048)]
    assert [(site.name, site.state) for site in fabric.sites()] == [
        ("alpha", "ready"),
        ("beta", "ready"),
    ]
    me = fabric.whoami()
    assert (me.project, me.scopes) == ("physics", ("query",))
    assert hub.api_key.startswith(f"fab_{me.key}_")


def test_a_run_is_on_record_and_on_the_statement(fabric: Fabric) -> None:
    answer = fabric.complete("a b", max_tokens=3)
    run = fabric.run(answer.run_id)
    assert (run.state, run.site, run.charge_usu) == ("completed", answer.site, answer.charge_usu)
    assert (run.digest, run.reason) == (answer.digest, answer.reason)
    assert run.usage.output_tokens == 3
    assert fabric.runs(limit=1)[0] == run
    line = next(line for line in fabric.usage().lines if line.run == answer.run_id)
    assert (line.kind, line.amount_usu) == ("charge", -answer.charge_usu)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"model": "nope"}, UnknownModel),
        ({"sites": ["nowhere"]}, UnknownSite),
        ({"max_tokens": 5000}, ContextExceeded),
        ({"n": 0}, RequestInvalid),
        ({"max_tokens": -1}, RequestInvalid),
        ({"temperature": 9}, RequestInvalid),
        ({"policy": "local-only"}, RequestInvalid),
    ],
)
def test_bad_input_is_a_typed_error(
    fabric: Fabric, options: dict[str, object], error: type[FabricError]
) -> None:
    with pytest.raises(error):
        fabric.complete("a", **options)  # type: ignore[arg-type]
    with pytest.raises(error):
        fabric.stream("a", **options)  # type: ignore[arg-type]


def test_a_wrong_key_and_another_ones_run_are_refused(hub: RunningHub, fabric: Fabric) -> None:
    with Fabric(hub.base_url, "fab_wrong") as stranger, pytest.raises(KeyInvalid):
        stranger.models()
    with pytest.raises(NotFound):
        fabric.run("run_" + "0" * 32)


def test_closing_a_stream_frees_its_row_and_charges_what_came(
    hub: RunningHub, fabric: Fabric
) -> None:
    with fabric.stream("a", max_tokens=2000) as stream:
        for _, _chunk in zip(range(5), stream, strict=False):
            pass
    wait_until(lambda: running(hub) == 0)
    wait_until(lambda: fabric.runs(limit=1)[0].state == "cancelled")
    assert 0 < fabric.runs(limit=1)[0].charge_usu < 1 + 2000 * 2


def test_cancelling_a_future_frees_its_row(hub: RunningHub, fabric: Fabric) -> None:
    future = fabric.submit("a", max_tokens=2000)
    wait_until(lambda: running(hub) == 1)
    assert future.cancel()
    wait_until(lambda: running(hub) == 0)
    wait_until(lambda: fabric.runs(limit=1)[0].state == "cancelled")


async def test_the_same_client_runs_in_an_event_loop(hub: RunningHub) -> None:
    async with AsyncFabric(hub.base_url, hub.api_key) as fabric:
        stream = await fabric.stream_chat("hi", max_tokens=3)
        assert "".join([chunk.text async for chunk in stream]) == words(3)


def test_no_balance_says_how_much_is_missing(tmp_path: Path) -> None:
    with (
        running_hub(tmp_path, sites=["alpha"], grant_usu=3) as hub,
        Fabric(hub.base_url, hub.api_key) as fabric,
        pytest.raises(InsufficientBalance) as caught,
    ):
        fabric.complete("a b c", max_tokens=100)
    assert caught.value.detail["available_usu"] == 3


def test_a_row_that_fails_is_reported_in_the_stream(tmp_path: Path) -> None:
    with (
        running_hub(
            tmp_path, sites=["alpha"], engine=lambda: FixedDelayEngine(fail_after=3)
        ) as hub,
        Fabric(hub.base_url, hub.api_key) as fabric,
        fabric.stream("a", max_tokens=9) as stream,
    ):
        with pytest.raises(RowFailed):
            list(stream)
        assert stream.text == words(3)


def test_a_seeded_stream_survives_the_death_of_its_site(
    tmp_path: Path, database: HubOptions
) -> None:
    with (
        running_hub(tmp_path, engine=lambda: FixedDelayEngine(token_s=0.01), **database) as hub,
        Fabric(hub.base_url, hub.api_key) as fabric,
        fabric.stream("a", max_tokens=60, seed=1, sites=["alpha", "beta"]) as stream,
    ):
        pieces = [next(stream) for _ in range(5)]
        first = stream.site
        assert first is not None
        hub.kill_site(first)
        pieces += list(stream)
        result = stream.result
    assert "".join(chunk.text for chunk in pieces) == words(60)
    assert result.attempts == 2
    assert result.site != first
    assert [chunk.because for chunk in pieces if chunk.because] != []


def test_an_unseeded_stream_breaks_honestly_when_its_site_dies(tmp_path: Path) -> None:
    with (
        running_hub(tmp_path, engine=lambda: FixedDelayEngine(token_s=0.01)) as hub,
        Fabric(hub.base_url, hub.api_key) as fabric,
        fabric.stream("a", max_tokens=200, temperature=1) as stream,
    ):
        next(stream)
        hub.kill_site(str(stream.site))
        with pytest.raises(StreamBroken):
            list(stream)


def test_without_any_replica_the_error_says_so(tmp_path: Path) -> None:
    from fabric.broker import BrokerSettings

    with (
        running_hub(tmp_path, sites=[], broker=BrokerSettings(patience_s=0.1)) as hub,
        Fabric(hub.base_url, hub.api_key, num_retries=0) as fabric,
        pytest.raises(PlacementError),
    ):
        fabric.complete("a", max_tokens=1)
