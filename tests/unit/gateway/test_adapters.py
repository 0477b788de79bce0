"""Adapters are their project's own, are checked when they come, and go to instances alone."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from fabric.adapters import Adapters, AdapterSettings
from fabric.errors import AdaptersFull, NotFound
from fabric.payloads.lora import digest_of, read_peft
from fabric.sql import Database
from fabric.testing.hub import MODEL, PROJECT, RunningHub, running_hub
from fabric.testing.lora import peft_config, peft_weights

ROUTE = "/v1/fabric/adapters"


def upload(client: httpx.Client, name: str, model: str = MODEL, **files: bytes) -> httpx.Response:
    content = {"config": peft_config(), "weights": peft_weights(), **files}
    form = {"name": name, "model": model}
    return client.post(ROUTE, data=form, files={k: (k, v) for k, v in content.items()})


@pytest.fixture(scope="module")
def stranger(hub: RunningHub) -> Iterator[httpx.Client]:
    """A client of another project."""
    hub.keys.add_project("strangers")
    _, key = hub.keys.add_key("strangers", scopes=["query"])
    headers = {"authorization": f"Bearer {key}"}
    with httpx.Client(base_url=hub.base_url, headers=headers, timeout=10) as client:
        yield client


def complete(client: httpx.Client, adapter: str) -> httpx.Response:
    body = {"model": MODEL, "prompt": "Hi", "max_tokens": 2, "fabric": {"adapter": adapter}}
    return client.post("/v1/completions", json=body)


def test_an_adapter_is_kept_listed_and_deleted(client: httpx.Client) -> None:
    added = upload(client, "kept").json()
    assert added["digest"] == digest_of(read_peft("x", peft_config(), peft_weights()).to_bytes())
    assert (added["rank"], added["num_layers"], added["project"]) == (2, 1, PROJECT)
    assert upload(client, "kept").json() == added, "the same again changes nothing"
    assert added in client.get(ROUTE).json()["data"]
    assert client.get(f"{ROUTE}/kept").json() == added
    other = upload(client, "kept", weights=peft_weights(start=0.25))
    assert (other.status_code, other.json()["error"]["code"]) == (409, "already_exists")
    assert client.delete(f"{ROUTE}/kept").json()["deleted"]
    for gone in (client.get(f"{ROUTE}/kept"), client.delete(f"{ROUTE}/kept"),
                 complete(client, "kept")):  # fmt: skip
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "not_found")


def test_another_projects_adapter_is_not_found(
    client: httpx.Client, stranger: httpx.Client
) -> None:
    upload(client, "secret")
    assert "secret" not in stranger.get(ROUTE).text
    answers = [
        stranger.get(f"{ROUTE}/secret"),
        stranger.delete(f"{ROUTE}/secret"),
        complete(stranger, "secret"),
        stranger.post(
            "/v1/fabric/explain",
            json={"model": MODEL, "prompt": "Hi", "fabric": {"adapter": "secret"}},
        ),
    ]
    assert [answer.status_code for answer in answers] == [404] * 4
    unknown = stranger.get(f"{ROUTE}/unknown").json()["error"]
    assert answers[0].json()["error"]["message"] == unknown["message"].replace("unknown", "secret")
    assert client.get(f"{ROUTE}/secret").status_code == 200
    assert upload(stranger, "secret", weights=peft_weights(start=2.0)).status_code == 200


def test_two_projects_share_contents_until_the_last_one_goes(
    hub: RunningHub, client: httpx.Client, stranger: httpx.Client
) -> None:
    weights = peft_weights(start=-3.0)
    digest = upload(client, "ours", weights=weights).json()["digest"]
    upload(stranger, "theirs", weights=weights)
    path = hub.files_dir.parent / "adapters" / digest.replace(":", "-")
    client.delete(f"{ROUTE}/ours")
    assert path.is_file()
    assert path.stat().st_mode & 0o077 == 0
    stranger.delete(f"{ROUTE}/theirs")
    assert not path.exists()


@pytest.mark.parametrize(
    ("name", "changes", "status", "param"),
    [
        ("bad", {"config": peft_config(use_dora=True)}, 400, "adapter"),
        ("bad", {"config": b"\x80\x04pickle"}, 400, "adapter"),
        ("bad", {"weights": peft_weights(start=float("nan"))}, 400, "adapter"),
        ("bad", {"weights": peft_weights()[:50]}, 400, "adapter"),
        ("bad", {"config": b" " * (2**20 + 1)}, 400, "config"),
        ("../bad", {}, 400, "name"),
        ("", {}, 400, "name"),
        ("a" * 64, {}, 400, "name"),
    ],
)
def test_bad_uploads_are_refused_and_leave_nothing(
    client: httpx.Client, name: str, changes: dict[str, bytes], status: int, param: str
) -> None:
    answer = upload(client, name, **changes)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["param"] == param
    assert name not in {one["name"] for one in client.get(ROUTE).json()["data"]}


def test_forms_that_lack_something_are_refused_by_its_name(client: httpx.Client) -> None:
    answer = upload(client, "lost", model="nothing")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    files = {"config": ("c", peft_config())}
    form = {"name": "lost", "model": MODEL}
    answer = client.post(ROUTE, data=form, files=files)
    assert answer.json()["error"]["param"] == "weights"
    assert client.post(ROUTE, content=b"--x").status_code == 400
    assert client.post(ROUTE, json={"name": "lost"}).status_code == 400


def test_the_limits_of_a_project_hold(database: Database, tmp_path: Path) -> None:
    with database.transaction() as connection:
        connection.exec_driver_sql(
            "INSERT INTO projects (name, title, created_at) VALUES ('p', 'p', 0)"
        )
    size = len(read_peft("x", peft_config(), peft_weights()).to_bytes())
    for settings, what in (
        (AdapterSettings(project_adapters=1), "pieces"),
        (AdapterSettings(project_bytes=2 * size - 1), "bytes"),
    ):
        adapters = Adapters(database, tmp_path / what, settings)
        adapters.prepare()
        first = adapters.add("p", "one", model="m@1", config=peft_config(), weights=peft_weights())
        with pytest.raises(AdaptersFull, match=what):
            adapters.add(
                "p", "two", model="m@1", config=peft_config(), weights=peft_weights(start=9.0)
            )
        assert [path.name for path in (tmp_path / what).iterdir()] == [
            first.digest.replace(":", "-")
        ]
        adapters.delete("one", project="p")
        with pytest.raises(NotFound):
            adapters.contents(first.digest, model="m@1")


def test_two_uploads_at_once_make_one_adapter(client: httpx.Client) -> None:
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda i: upload(client, "race", weights=peft_weights(start=i)),
                                [1.0, 2.0, 3.0, 1.0]))  # fmt: skip
    assert {answer.status_code for answer in answers} <= {200, 409}
    kept = client.get(f"{ROUTE}/race").json()
    assert kept in [answer.json() for answer in answers]


def test_contents_go_to_instances_of_their_version_alone(
    hub: RunningHub, client: httpx.Client
) -> None:
    digest = upload(client, "fetched").json()["digest"]
    url = f"{hub.base_url}/v1/fabric/adapter-files/{digest}"
    assert httpx.get(url).status_code == 401
    assert client.get(url).status_code == 401, "an API key is no launch token"
    _, token = hub.catalog.add_launch("alpha", MODEL)
    instance = {"authorization": f"Bearer {token}"}
    reply = httpx.get(url, headers=instance)
    assert digest_of(reply.content) == digest
    assert httpx.get(url[:-1] + "0", headers=instance).status_code == 404
    hub.catalog.add_model("other", "1", context_tokens=64, source="fixed-delay:")
    _, other = hub.catalog.add_launch("alpha", "other@1")
    assert httpx.get(url, headers={"authorization": f"Bearer {other}"}).status_code == 404


def test_replicas_that_serve_no_adapters_are_not_chosen(client: httpx.Client) -> None:
    upload(client, "unserved")
    body = {"model": MODEL, "prompt": "Hi", "fabric": {"adapter": "unserved"}}
    answer = client.post("/v1/fabric/explain", json=body)
    assert answer.status_code == 503
    assert "it serves no adapters" in answer.text


def test_a_restarted_hub_has_its_adapters(tmp_path: Path) -> None:
    found = []
    for _ in range(2):
        with running_hub(tmp_path, sites=("alpha",)) as hub:
            headers = {"authorization": f"Bearer {hub.api_key}"}
            with httpx.Client(base_url=hub.base_url, headers=headers, timeout=10) as client:
                if not found:
                    upload(client, "lasting")
                found.append(client.get(ROUTE).json())
                digest = found[-1]["data"][0]["digest"]
                _, token = hub.catalog.add_launch("alpha", MODEL)
                reply = httpx.get(
                    f"{hub.base_url}/v1/fabric/adapter-files/{digest}",
                    headers={"authorization": f"Bearer {token}"},
                )
                assert digest_of(reply.content) == digest
    assert found[0] == found[1]
