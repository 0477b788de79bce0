"""What users may ask of the fabric itself, and what those who run it look at."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from fabric import __version__
from fabric.errors import StorageBusy
from fabric.messages import Placement
from fabric.messages.session import PROTOCOL
from fabric.testing.hub import RunningHub, wait_until

GOOD = {"model": "fixed", "prompt": "one two", "max_tokens": 3}
CHAT = {"model": "fixed", "messages": [{"role": "user", "content": "hi"}]}


def complete(client: httpx.Client, **fields: object) -> dict[str, object]:
    reply = client.post("/v1/completions", json=GOOD | fields)
    assert reply.status_code == 200, reply.text
    ours: dict[str, object] = reply.json()["fabric"]
    return ours


def test_whoami_says_whose_the_key_is(client: httpx.Client, hub: RunningHub) -> None:
    caller = client.get("/v1/fabric/whoami").json()
    assert caller["project"] == "physics"
    assert caller["scopes"] == ["query"]
    assert caller["key"] in hub.api_key
    assert hub.api_key not in caller["key"]


def test_sites_show_their_replicas_and_disabled_ones_say_so(
    client: httpx.Client, hub: RunningHub
) -> None:
    hub.catalog.add_site("closed", display="Closed Centre", state="disabled")
    sites = {site["name"]: site for site in client.get("/v1/fabric/sites").json()["data"]}
    assert sites["alpha"]["state"] == sites["beta"]["state"] == "ready"
    assert (sites["closed"]["state"], sites["closed"]["replicas"]) == ("disabled", [])
    assert sites["closed"]["display"] == "Closed Centre"
    [replica] = sites["alpha"]["replicas"]
    assert replica["instance"] == hub.sites["alpha"].instance
    assert replica["context_tokens"] == 2048
    hub.catalog.delete_site("closed")


def test_models_show_their_versions_and_where_they_run(
    client: httpx.Client, hub: RunningHub
) -> None:
    hub.catalog.add_model("fixed", "2", context_tokens=64, source="fixed-delay:")
    try:
        versions = client.get("/v1/fabric/models").json()["data"]
        newer, older = (version for version in versions if version["name"] == "fixed")
        assert (newer["id"], newer["digest"], newer["replicas"]) == ("fixed@2", None, [])
        assert older["id"] == "fixed@1"
        assert {replica["site"] for replica in older["replicas"]} == {"alpha", "beta"}
        models = client.get("/v1/models").json()["data"]
        [listed] = (model for model in models if model["id"] == "fixed")
        assert (listed["id"], listed["fabric"]["revision"]) == ("fixed", "2")
        assert client.get("/v1/models/fixed@1").json()["fabric"]["revision"] == "1"
    finally:
        hub.catalog.delete_model("fixed@2")


@pytest.mark.parametrize("body", [GOOD, CHAT], ids=["completion", "chat"])
def test_explain_shows_every_candidate_and_charges_nothing(
    client: httpx.Client, hub: RunningHub, body: dict[str, object]
) -> None:
    before = len(hub.ledger.statement("physics").lines)
    reply = client.post("/v1/fabric/explain", json=body | {"fabric": {"sites": ["beta"]}})
    placement = Placement.model_validate(reply.json())
    assert placement.site == "beta"
    excluded = {candidate.site: candidate.excluded for candidate in placement.candidates}
    assert excluded["beta"] is None
    assert excluded["alpha"] is not None
    assert len(hub.ledger.statement("physics").lines) == before


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (GOOD | {"prompt": ["a", "b"]}, "prompt"),
        (GOOD | {"colour": 1}, "colour"),
        (CHAT | {"colour": 1}, "colour"),
        (CHAT | {"messages": []}, "messages"),
    ],
)
def test_explain_refuses_what_the_routes_refuse(
    client: httpx.Client, body: dict[str, object], param: str
) -> None:
    reply = client.post("/v1/fabric/explain", json=body)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == param


def test_a_body_that_is_no_json_is_no_body_to_explain(client: httpx.Client) -> None:
    reply = client.post("/v1/fabric/explain", content=b"{")
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_body")


def test_a_run_is_on_record_and_on_the_statement(client: httpx.Client) -> None:
    ours = complete(client)
    path = f"/v1/fabric/runs/{ours['run']}"
    wait_until(lambda: client.get(path).json().get("state") == "completed")
    run = client.get(path).json()
    assert (run["site"], run["digest"]) == (ours["site"], ours["digest"])
    assert (run["charge_usu"], run["usage"]["output_tokens"]) == (2 + 2 * 3, 3)
    assert run["placement"]["reason"] == ours["reason"]
    assert client.get("/v1/fabric/runs?limit=1").json()["data"][0]["id"] == ours["run"]
    usage = client.get("/v1/fabric/usage?limit=1").json()
    assert (usage["project"], usage["complete"]) == ("physics", False)
    [line] = usage["lines"]
    assert (line["run"], line["amount_usu"]) == (ours["run"], -8)
    [allocation] = usage["allocations"]
    assert line["balance_usu"] == allocation["available_usu"] + allocation["held_usu"]


def test_usage_since_a_time_leaves_out_what_was_before(client: httpx.Client) -> None:
    complete(client)
    assert client.get("/v1/fabric/usage", params={"since": "2999-01-01"}).json()["lines"] == []
    lines = client.get("/v1/fabric/usage", params={"since": "2000-01-01T00:00:00Z"}).json()["lines"]
    assert len(lines) >= 2


# ---- operations ----------------------------------------------------------------------------------


def test_health_counts_ready_replicas(hub: RunningHub) -> None:
    reply = httpx.get(f"{hub.base_url}/healthz")
    told = {"release": __version__, "protocol": PROTOCOL}
    assert (reply.status_code, reply.json()) == (
        200,
        {"status": "ok", "replicas": 2, "database": "ok", **told},
    )


def test_health_is_503_when_the_database_does_not_answer(
    hub: RunningHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy() -> None:
        raise StorageBusy(reason="locked")

    monkeypatch.setattr(hub.catalog, "sites", busy)
    reply = httpx.get(f"{hub.base_url}/healthz")
    assert (reply.status_code, reply.json()["database"]) == (503, "storage_busy")


@pytest.mark.parametrize("forwarded_for", ["203.0.113.5", "not an address"])
def test_metrics_need_an_administrators_key_from_elsewhere(
    hub: RunningHub, forwarded_for: str
) -> None:
    _, admin = hub.keys.add_key("physics", scopes=["admin"])
    statuses = [
        httpx.get(
            f"{hub.base_url}/metrics",
            headers={"x-forwarded-for": forwarded_for, "authorization": f"Bearer {key}"},
        ).status_code
        for key in ("wrong", hub.api_key, admin)
    ]
    assert statuses == [401, 403, 200]


def samples(hub: RunningHub) -> dict[tuple[str, str], float]:
    """Return every sample by its name and its model's site, state or nothing, summed."""
    text = httpx.get(f"{hub.base_url}/metrics").text
    found: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            label = sample.labels.get("site") or sample.labels.get("state") or ""
            found[sample.name, label] = found.get((sample.name, label), 0.0) + sample.value
    return found


def test_metrics_count_what_was_asked(client: httpx.Client, hub: RunningHub) -> None:
    before = samples(hub)
    ours = complete(client, n=2)
    client.post("/v1/completions", json=GOOD | {"prompt": "w " * 3000})
    after = samples(hub)

    def grown(name: str, label: str = "") -> float:
        return after[name, label] - before.get((name, label), 0.0)

    assert grown("vllm:prompt_tokens_total") == 2
    assert grown("vllm:generation_tokens_total") == 6
    assert grown("vllm:request_success_total") == 2
    assert grown("vllm:time_to_first_token_seconds_count") == 1
    assert grown("vllm:inter_token_latency_seconds_count") == 2
    assert grown("vllm:e2e_request_latency_seconds_count") == 1
    assert grown("vllm:request_queue_time_seconds_count") == 1
    assert grown("fabric_charge_usu_total") == ours["charge_usu"]
    assert grown("fabric_requests_total", "completed") == 1
    assert grown("fabric_requests_total", "failed") == 1
    assert after["fabric_replicas", "alpha"] == 1
    assert after["vllm:num_requests_running", "alpha"] == 0
    assert after["vllm:kv_cache_usage_perc", "beta"] == 0
    assert grown("fabric_device_seconds_total") >= 0
    for name in ("vllm:num_preemptions_total", "fabric_engine_steps_total"):
        assert after[name, "alpha"] == 0


def test_metrics_name_no_project_key_or_prompt(client: httpx.Client, hub: RunningHub) -> None:
    complete(client, prompt="canary-7b1e", user="canary-7b1e")
    text = httpx.get(f"{hub.base_url}/metrics").text
    assert "canary-7b1e" not in text
    assert "physics" not in text
    assert hub.api_key[:16] not in text


def test_the_schema_describes_the_bodies(hub: RunningHub) -> None:
    schema = httpx.get(f"{hub.base_url}/openapi.json").json()
    body = schema["paths"]["/v1/chat/completions"]["post"]["requestBody"]
    assert "messages" in body["content"]["application/json"]["schema"]["properties"]


def test_all_that_the_schema_refers_to_is_in_it(hub: RunningHub) -> None:
    text = httpx.get(f"{hub.base_url}/openapi.json").text
    named = set(re.findall(r'"\$ref": ?"([^"]+)"', text))
    parts = json.loads(text)["components"]["schemas"]
    assert len(named) > 30
    assert {one.removeprefix("#/components/schemas/") for one in named} <= parts.keys()


def test_whoami_tells_how_long_a_key_lasts_and_whose_it_is(hub: RunningHub) -> None:
    ends = datetime.now(UTC) + timedelta(hours=1)
    record, key = hub.keys.add_key("physics", expires_at=ends)
    reply = httpx.get(
        f"{hub.base_url}/v1/fabric/whoami", headers={"authorization": f"Bearer {key}"}
    ).json()
    assert datetime.fromisoformat(reply.pop("expires_at")) == ends
    assert reply == {
        "key": record.id,
        "project": "physics",
        "projects": ["physics"],
        "scopes": ["query"],
        "site": None,
        "max_concurrent": 64,
        "auth": "api-key",
        "user": None,
    }


def test_key_is_refused_with_the_name_of_another_project(
    hub: RunningHub, client: httpx.Client
) -> None:
    assert client.get("/v1/models", headers={"Fabric-Project": "physics"}).status_code == 200
    reply = client.get("/v1/models", headers={"Fabric-Project": "chemistry"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (403, "foreign_project")
