"""What an instance is paid for tickets: spoken to frame by frame."""

from __future__ import annotations

import json
import logging

import httpx
import pytest

from fabric.messages import RunState, Sampling, TextInput
from fabric.testing.hub import MODEL, PROJECT, RunningHub, wait_until
from fabric.testing.raw_calls import (
    GRANT_USU,
    MAX_CHARGE_USU,
    balance,
    get_request,
    issue,
    record_of,
)


def test_a_call_is_held_charged_by_its_usage_and_recorded(hub, client, launch) -> None:
    asked = get_request()
    with launch()() as instance:
        assert instance.redeem(issue(client), asked) is None
        assert balance(hub) == (GRANT_USU - MAX_CHARGE_USU, MAX_CHARGE_USU)
        instance.report(asked.id, prompt_tokens=3, output_tokens=4)
    assert balance(hub) == (GRANT_USU - 11, 0)
    run = record_of(hub, asked.id)
    assert (run.state, run.site, run.charge_usu) == (RunState.COMPLETED, "alpha", 11)
    assert (run.usage.output_tokens, run.total_s) == (4, 1.5)
    assert "raw call" in run.placement.reason
    (line,) = client.get("/v1/fabric/usage").json()["lines"][-1:]
    assert (line["kind"], line["run"], line["site"]) == ("charge", asked.id, "alpha")


def test_the_rate_is_that_of_the_site_when_the_call_came(hub, client, launch) -> None:
    hub.ledger.set_rate(MODEL, "alpha", prompt_usu=100, cached_prompt_usu=100, output_usu=200)
    asked = get_request()
    with launch()() as instance:
        assert instance.redeem(issue(client), asked) is None
        hub.ledger.set_rate(MODEL, "alpha", prompt_usu=1, cached_prompt_usu=1, output_usu=1)
        instance.report(asked.id, prompt_tokens=3, output_tokens=4)
    assert record_of(hub, asked.id).charge_usu == 1100


def test_the_same_usage_twice_is_charged_once(hub, client, launch) -> None:
    asked = get_request()
    with launch()() as instance:
        ticket = issue(client)
        assert instance.redeem(ticket, asked) is None
        for output_tokens in (4, 4, 9):
            instance.report(asked.id, prompt_tokens=3, output_tokens=output_tokens)
        assert instance.redeem(ticket, asked) == "already_exists"
    assert balance(hub) == (GRANT_USU - 11, 0)
    assert record_of(hub, asked.id).usage.output_tokens == 4


def test_an_instance_cannot_charge_more_than_was_held(hub, client, launch) -> None:
    asked = get_request()
    with launch()() as instance:
        assert instance.redeem(issue(client), asked) is None
        instance.report(asked.id, prompt_tokens=10**9, cached_prompt_tokens=5, output_tokens=10**9)
    assert balance(hub) == (GRANT_USU - MAX_CHARGE_USU, 0)
    assert record_of(hub, asked.id).usage.output_tokens == 10


def test_usage_without_a_ticket_of_this_instance_costs_nothing(
    hub, client, launch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = get_request()
    with launch()() as instance, launch()() as other:
        assert instance.redeem(issue(client), asked) is None
        other.report(asked.id, prompt_tokens=3, output_tokens=4)
        other.report("run_unheard_of", prompt_tokens=3, output_tokens=4)
        assert balance(hub) == (GRANT_USU - MAX_CHARGE_USU, MAX_CHARGE_USU)
        instance.report(asked.id, "request_cancelled", prompt_tokens=3, output_tokens=1)
    assert "without a ticket" in caplog.text
    assert balance(hub) == (GRANT_USU - 5, 0)
    assert record_of(hub, asked.id).state is RunState.CANCELLED


def test_a_call_that_computed_nothing_costs_nothing(hub, client, launch) -> None:
    asked = get_request()
    with launch()() as instance:
        assert instance.redeem(issue(client), asked) is None
        instance.report(asked.id, "context_length_exceeded")
    assert balance(hub) == (GRANT_USU, 0)
    run = record_of(hub, asked.id)
    assert (run.state, run.error_code) == (RunState.FAILED, "context_length_exceeded")


def test_a_ticket_pays_up_to_its_cap(hub, client, launch) -> None:
    ticket = issue(client, max_usu=MAX_CHARGE_USU + 11)
    first, second, third = get_request(), get_request(), get_request()
    with launch()() as instance:
        assert instance.redeem(ticket, first) is None
        assert instance.redeem(ticket, second) == "spent_ticket"
        instance.report(first.id, prompt_tokens=3, output_tokens=4)
        assert instance.redeem(ticket, third) is None
        instance.report(third.id, prompt_tokens=3, output_tokens=4)
        assert instance.redeem(ticket, get_request()) == "spent_ticket"
    assert balance(hub) == (GRANT_USU - 22, 0)


@pytest.mark.parametrize(
    ("why", "code"),
    [
        ("key", "invalid_ticket"),
        ("revoked", "invalid_ticket"),
        ("empty", "missing_ticket"),
        ("another site", "foreign_ticket"),
        ("another model", "no_replica"),
        ("unknown model", "model_not_found"),
        ("only elsewhere", "no_replica"),
        ("local data elsewhere", "no_replica"),
        ("too dear", "insufficient_balance"),
        ("no id", "invalid_parameter"),
        ("another's request", "protocol_violation"),
    ],
)
def test_what_may_not_run_is_refused_and_nothing_held(hub, client, launch, why, code) -> None:
    hub.catalog.add_model("other", "1", context_tokens=64, source="x:", digest="sha256:" + "1" * 64)
    ticket, asked, changes = issue(client), get_request(), {}
    match why:
        case "key":
            ticket = hub.api_key
        case "revoked":
            client.delete(f"/v1/fabric/tickets/{ticket[5:17]}")
        case "empty":
            ticket = ""
        case "another site":
            ticket = issue(client, "beta")
        case "another model":
            asked = get_request(model="other")
        case "unknown model":
            asked = get_request(model="unheard-of")
        case "only elsewhere":
            asked = get_request(sites=("beta",))
        case "local data elsewhere":
            asked = get_request(policy="local-only", data_site="beta")
        case "too dear":
            asked = get_request(input=TextInput(text="x" * 2 * GRANT_USU), sampling=Sampling(n=16))
        case "no id":
            asked = get_request(id="../" + "x" * 100)
        case "another's request":
            changes = {"task_id": "run_x"}
    with launch()() as instance:
        assert instance.redeem(ticket, asked, **changes) == code
        assert instance.redeem(issue(client), get_request()) is None
    assert balance(hub)[1] == MAX_CHARGE_USU


def test_calls_count_for_the_keys_limit(hub, client, launch) -> None:
    _, key = hub.keys.add_key(PROJECT, max_concurrent=1)
    headers = {"authorization": f"Bearer {key}"}
    with httpx.Client(base_url=hub.base_url, headers=headers) as single, launch()() as instance:
        first, second = get_request(), get_request()
        assert instance.redeem(issue(single), first) is None
        assert instance.redeem(issue(single), second) == "too_many_requests"
        instance.report(first.id, prompt_tokens=3, output_tokens=4)
        assert instance.redeem(issue(single), second) is None


def test_a_ticket_opens_nothing_that_its_project_was_not_granted(hub, client, launch) -> None:
    ticket, dialled = issue(client), launch()
    hub.grants.close("model", MODEL)
    with dialled() as instance:
        wait_until(
            lambda: instance.redeem(ticket, get_request()) == "model_not_found", timeout_s=20
        )
        hub.grants.add(f"project:{PROJECT}", model=MODEL, site="beta")
        wait_until(lambda: instance.redeem(ticket, get_request()) == "not_granted", timeout_s=20)


def test_raw_calls_count_for_the_minute(hub, client, launch) -> None:
    hub.grants.set_limit(f"project:{PROJECT}", requests_per_min=2, tokens_per_min=100)
    ticket = issue(client)
    wait_until(lambda: "x-ratelimit-limit-tokens" in client.get("/v1/models").headers, timeout_s=20)
    with launch()() as instance:
        first = get_request()
        assert instance.redeem(ticket, first) is None
        instance.report(first.id, prompt_tokens=3, output_tokens=4)
        headers = client.get("/v1/models").headers
        assert headers["x-ratelimit-remaining-tokens"] == "93"
        assert instance.redeem(ticket, get_request()) is None
        assert instance.redeem(ticket, get_request()) == "rate_limit_exceeded"


def test_a_hold_lives_as_long_as_its_instances_session(hub, client, launch) -> None:
    asked, dialled = get_request(), launch()
    with dialled() as instance:
        assert instance.redeem(issue(client), asked) is None
        now = hub.ledger.hold(
            asked.id, allocation=f"allocation:{PROJECT}:*", amount_usu=26, lease_s=1
        )
        wait_until(lambda: _lease(hub, asked.id) > now.lease_expires_at, timeout_s=40)
    wait_until(lambda: balance(hub) == (GRANT_USU, 0), timeout_s=40)
    run = record_of(hub, asked.id)
    assert (run.state, run.error_code, run.charge_usu) == (RunState.FAILED, "session_lost", 0)
    with dialled() as instance:
        instance.report(asked.id, prompt_tokens=3, output_tokens=4)
    assert balance(hub) == (GRANT_USU, 0)


def _lease(hub: RunningHub, run: str) -> object:
    amount_usu = MAX_CHARGE_USU
    allocation = f"allocation:{PROJECT}:*"
    hold = hub.ledger.hold(run, allocation=allocation, amount_usu=amount_usu, lease_s=1)
    return hold.lease_expires_at


def test_an_instance_that_comes_back_is_paid(hub, client, launch) -> None:
    asked, dialled = get_request(), launch()
    with dialled() as instance:
        assert instance.redeem(issue(client), asked) is None
    with dialled() as instance:
        instance.report(asked.id, prompt_tokens=3, output_tokens=4)
    assert record_of(hub, asked.id).charge_usu == 11


def test_tickets_are_not_logged(hub, client, launch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "fabric")
    ticket = issue(client)
    with launch()() as instance:
        assert instance.redeem(ticket, get_request()) is None
        assert instance.redeem(ticket[:-1] + "!", get_request()) == "invalid_ticket"
    records = [json.dumps(one.__dict__, default=repr) for one in caplog.records]
    assert any("raw call refused" in one for one in records)
    assert not any(ticket[18:30] in one for one in records)
