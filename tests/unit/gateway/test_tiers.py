"""What users are told of tiers: promises kept, what waits, what a run would take, and refusals."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from fabric.messages import Limits
from fabric.testing.engine import FixedDelayEngine
from fabric.testing.hub import RunningHub, running_hub, wait_until

ESTIMATE = {"model": "fixed", "num_requests": 1000, "prompt_tokens": 100, "output_tokens": 10}
NUM_WAITING = 36


def complete(client: httpx.Client, **changes: Any) -> httpx.Response:
    body = {"model": "fixed", "prompt": "one two", "max_tokens": 3, **changes}
    return client.post("/v1/completions", json=body)


def attained(client: httpx.Client, tier: str, measure: str) -> dict[str, Any]:
    found = client.get("/v1/fabric/slo").json()["data"]
    [one] = [
        each
        for each in found
        if (each["tier"], each["measure"], each["window"]) == (tier, measure, "1h")
    ]
    result: dict[str, Any] = one
    return result


def test_a_request_counts_for_the_promise_of_its_tier(client: httpx.Client) -> None:
    before = attained(client, "interactive", "first_token")["num_requests"]
    assert complete(client, fabric={"tier": "interactive"}).status_code == 200
    wait_until(
        lambda: attained(client, "interactive", "first_token")["num_requests"] == before + 1,
        timeout_s=20,
    )
    first = attained(client, "interactive", "first_token")
    assert (first["limit_s"], first["objective"]) == (2.0, 0.95)
    assert 0.0 <= first["attained"] <= 1.0


def test_promises_and_queues_are_metrics(client: httpx.Client) -> None:
    assert complete(client).status_code == 200
    found = {
        sample.name: sample
        for family in text_string_to_metric_families(client.get("/metrics").text)
        for sample in family.samples
    }
    assert found["fabric_slo_objective_ratio"].value > 0.9
    assert found["fabric_slo_budget_left_ratio"].labels["window"] in ("5m", "1h", "6h", "24h")
    families = client.get("/metrics").text
    assert "# TYPE fabric_slo_attained_ratio gauge" in families
    assert "# TYPE fabric_requests_waiting gauge" in families


def test_an_estimate_names_each_site_with_its_price_and_charges_nothing(
    client: httpx.Client, hub: RunningHub
) -> None:
    lines = len(hub.ledger.statement("physics").lines)
    found = client.post("/v1/fabric/estimate", json=ESTIMATE | {"tier": "standard"}).json()
    assert {"alpha", "beta"} <= {site["site"] for site in found["sites"]}
    assert {site["charge_usu"] for site in found["sites"]} == {1000 * (100 + 2 * 10)}, found
    duration = found["duration"]
    assert 0 < duration["p10_s"] <= duration["p50_s"] <= duration["p90_s"]
    cheaper = client.post("/v1/fabric/estimate", json=ESTIMATE | {"sites": ["beta"]}).json()
    [beta] = cheaper["sites"]
    assert (beta["site"], beta["charge_usu"]) == ("beta", 1000 * 60)
    assert cheaper["tier"] == "batch"
    assert len(hub.ledger.statement("physics").lines) == lines


@pytest.mark.parametrize(
    ("changes", "status", "param"),
    [
        ({"model": "unheard-of"}, 404, "model"),
        ({"sites": ["nowhere"]}, 404, "site"),
        ({"num_requests": 0}, 400, "num_requests"),
        ({"num_requests": 10**13}, 400, "num_requests"),
        ({"num_requests": 1.5}, 400, "num_requests"),
        ({"num_requests": "many"}, 400, "num_requests"),
        ({"prompt_tokens": 0}, 400, "prompt_tokens"),
        ({"prompt_tokens": 10**30}, 400, "prompt_tokens"),
        ({"prompt_tokens": 2**20}, 400, "prompt"),
        ({"output_tokens": -1}, 400, "output_tokens"),
        ({"output_tokens": 10**6}, 400, "prompt"),
        ({"tier": "express"}, 400, "tier"),
        ({"colour": 1}, 400, "colour"),
    ],
)
def test_what_cannot_be_estimated_is_refused_by_name(
    client: httpx.Client, changes: dict[str, object], status: int, param: str
) -> None:
    reply = client.post("/v1/fabric/estimate", json=ESTIMATE | changes)
    assert reply.status_code == status, reply.text
    assert reply.json()["error"]["param"] == param


def test_no_number_is_too_large_to_be_estimated(client: httpx.Client) -> None:
    found = client.post("/v1/fabric/estimate", json=ESTIMATE | {"num_requests": 10**12}).json()
    assert found["charge_usu"] == 10**12 * 60


# ---- a site that is busy -------------------------------------------------------------------------


def get_engine() -> FixedDelayEngine:
    limits = Limits(context_tokens=2048, max_rows=1, cache_tokens=10**6)
    return FixedDelayEngine(first_token_s=0.1, token_s=0.05, limits=limits)


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHub]:
    with running_hub(tmp_path_factory.mktemp("busy"), sites=("alpha",), engine=get_engine) as hub:
        yield hub


def test_who_would_be_late_is_told_when_to_come_back(busy: RunningHub) -> None:
    headers = {"authorization": f"Bearer {busy.api_key}"}
    busy.keys.add_project("other")
    _, other_key = busy.keys.add_key("other")
    busy.ledger.grant(busy.ledger.open_allocation("other", "*"), 10**9)
    other = {"authorization": f"Bearer {other_key}"}
    with httpx.Client(base_url=busy.base_url, headers=headers, timeout=60) as client:
        assert complete(client).status_code == 200
        with ThreadPoolExecutor(NUM_WAITING) as threads:
            asked = [threads.submit(complete, client) for _ in range(NUM_WAITING)]
            wait_until(
                lambda: (
                    sum(one.num_waiting for one in busy.broker.tiers.waiting()) >= NUM_WAITING - 6
                ),
                timeout_s=20,
            )
            reply = complete(client, fabric={"deadline_s": 3.0})
            [mine] = client.get("/v1/fabric/queue").json()["data"]
            [theirs] = client.get("/v1/fabric/queue", headers=other).json()["data"]
            assert all(one.result().status_code == 200 for one in asked)
    assert reply.status_code == 503, reply.text
    error = reply.json()["error"]
    assert (error["code"], error["detail"]["tier"]) == ("overloaded", "standard")
    assert 1 <= int(reply.headers["retry-after"]) <= 3600
    assert reply.headers["x-should-retry"] == "true"
    assert (mine["tier"], mine["num_mine"]) == ("standard", mine["num_waiting"])
    assert theirs["num_mine"] == 0
    assert theirs["num_waiting"] > 0
