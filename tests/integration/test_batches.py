"""Files and batches by the official OpenAI client, unmodified, against a real hub."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from openai import OpenAI
from openai.types import Batch, FileObject

from fabric.batches import BatchSettings
from fabric.messages import Limits
from fabric.testing.engine import FixedDelayEngine
from fabric.testing.hub import MODEL, PROJECT, RunningHub, running_hub

FINAL = {"completed", "failed", "expired", "cancelled"}
PATIENCE_S = 60.0
COMPLETIONS: Literal["/v1/completions"] = "/v1/completions"
CHAT = "/v1/chat/completions"
LIMITS = BatchSettings(poll_s=0.05, lease_s=1.0, num_lines=200, line_bytes=2**16)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHub]:
    with running_hub(tmp_path_factory.mktemp("hub"), batches=LIMITS) as hub:
        yield hub


@pytest.fixture
def client(hub: RunningHub) -> Iterator[OpenAI]:
    with client_of(hub) as client:
        yield client


def client_of(hub: RunningHub, key: str | None = None) -> OpenAI:
    return OpenAI(base_url=hub.openai_url, api_key=key or hub.api_key, max_retries=0, timeout=30)


def request(custom_id: str, url: str = COMPLETIONS, **body: object) -> dict[str, object]:
    asked: dict[str, object] = {"model": MODEL, "max_tokens": 3, **body}
    asked |= {} if url == CHAT or "prompt" in body else {"prompt": "one two"}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": asked}


def jsonl(*lines: object) -> bytes:
    return "".join(f"{json.dumps(line)}\n" for line in lines).encode()


def upload(client: OpenAI, content: bytes) -> FileObject:
    return client.files.create(file=("requests.jsonl", content), purpose="batch")


def submit(client: OpenAI, *lines: object, endpoint: Any = COMPLETIONS) -> Batch:
    file = upload(client, jsonl(*lines))
    return client.batches.create(
        input_file_id=file.id, endpoint=endpoint, completion_window="24h", metadata={"run": "a"}
    )


def wait(client: OpenAI, batch: Batch, until: Callable[[Batch], bool] | None = None) -> Batch:
    until = until or (lambda batch: batch.status in FINAL)
    deadline = time.monotonic() + PATIENCE_S
    while not until(batch := client.batches.retrieve(batch.id)):
        assert time.monotonic() < deadline, f"{batch.status} {batch.request_counts}"
        time.sleep(0.02)
    return batch


def done(batch: Batch) -> int:
    assert batch.request_counts is not None
    return batch.request_counts.completed


def lines_of(client: OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    if file_id is None:
        return []
    return [json.loads(line) for line in client.files.content(file_id).text.splitlines()]


def ids_of(lines: list[dict[str, Any]]) -> list[str]:
    return [line["custom_id"] for line in lines]


def charges_of(hub: RunningHub) -> Counter[str]:
    """How often each run is on the statement."""
    lines = hub.ledger.statement(PROJECT).lines
    return Counter(str(line.run) for line in lines if line.kind == "charge")


def runs_of(output: list[dict[str, Any]]) -> set[str]:
    return {line["response"]["request_id"] for line in output}


def assert_each_charged_once(hub: RunningHub, output: list[dict[str, Any]]) -> None:
    """Every line of an output is on the statement, and nothing else is there."""
    assert charges_of(hub) == Counter(runs_of(output))


# ---- files ---------------------------------------------------------------------------------------


def test_files_are_kept_listed_and_deleted(client: OpenAI) -> None:
    content = jsonl(request("a"))
    file = client.files.create(
        file=("x.jsonl", content),
        purpose="batch",
        expires_after={"anchor": "created_at", "seconds": 7200},
    )
    assert (file.bytes, file.filename, file.purpose) == (len(content), "x.jsonl", "batch")
    assert file.expires_at == file.created_at + 7200
    assert client.files.content(file.id).content == content
    assert client.files.retrieve(file.id).id == file.id
    other = upload(client, content)
    listed = [one.id for one in client.files.list(purpose="batch")]
    assert listed.index(other.id) < listed.index(file.id)
    assert [one.id for one in client.files.list(limit=1)][:2] == listed[:2]
    assert client.files.delete(file.id).deleted
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(file.id)


def test_contents_are_readable_by_the_hub_alone(client: OpenAI, hub: RunningHub) -> None:
    file = upload(client, jsonl(request("a")))
    path = hub.files_dir / file.id
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_bad_uploads_are_refused(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="empty"):
        upload(client, b"")
    with pytest.raises(openai.BadRequestError) as caught:
        client.files.create(file=("x", b"x"), purpose="fine-tune")
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "purpose")
    with pytest.raises(openai.BadRequestError, match="form"):
        client.post("/files", body={"purpose": "batch"}, cast_to=FileObject)


def test_a_file_may_be_larger_than_other_bodies_but_not_than_its_own_cap(tmp_path: Path) -> None:
    limits = BatchSettings(file_bytes=9 * 2**20, project_bytes=12 * 2**20)
    with (
        running_hub(tmp_path, sites=[], batches=limits) as hub,
        client_of(hub) as client,
    ):
        assert upload(client, b" " * 9 * 2**20).bytes == 9 * 2**20
        with pytest.raises(openai.APIStatusError) as caught:
            upload(client, b" " * 11 * 2**20)
        assert (caught.value.status_code, caught.value.code) == (413, "body_too_large")
        with pytest.raises(openai.APIStatusError) as caught:
            upload(client, b" " * 4 * 2**20)
        assert (caught.value.status_code, caught.value.code) == (413, "files_full")
        assert len(list(hub.files_dir.iterdir())) == 1


def test_another_projects_files_and_batches_do_not_exist(client: OpenAI, hub: RunningHub) -> None:
    batch = submit(client, request("a"))
    hub.keys.add_project("chemistry")
    with client_of(hub, hub.keys.add_key("chemistry")[1]) as stranger:
        assert not list(stranger.files.list())
        assert not list(stranger.batches.list())
        for call, name in (
            (stranger.files.retrieve, batch.input_file_id),
            (stranger.files.content, batch.input_file_id),
            (stranger.files.delete, batch.input_file_id),
            (stranger.batches.retrieve, batch.id),
            (stranger.batches.cancel, batch.id),
        ):
            with pytest.raises(openai.NotFoundError):
                call(name)
        with pytest.raises(openai.NotFoundError):
            stranger.batches.create(
                input_file_id=batch.input_file_id, endpoint=COMPLETIONS, completion_window="24h"
            )
    with (
        client_of(hub, hub.keys.add_key(PROJECT, scopes={"admin"})[1]) as admin,
        pytest.raises(openai.PermissionDeniedError),
    ):
        admin.batches.list()
    wait(client, batch)


# ---- what a batch answers ------------------------------------------------------------------------


def test_a_batch_is_answered_line_by_line_at_the_batch_tier(tmp_path: Path) -> None:
    with (
        running_hub(tmp_path, batches=LIMITS, engine=slow) as hub,
        client_of(hub) as client,
    ):
        lines = [request(f"line-{i}") for i in range(60)]
        lines.insert(7, request("two", prompt=["one", "two three"], n=2))
        lines.insert(30, request("bad", temperature=3))
        lines.insert(31, request("streamed", stream=True))
        batch = submit(client, *lines)
        assert (batch.status, batch.metadata) == ("validating", {"run": "a"})
        ended = wait(client, batch)
        counts = ended.request_counts
        assert counts is not None
        assert (ended.status, ended.model) == ("completed", MODEL)
        assert (counts.total, counts.completed, counts.failed) == (63, 61, 2)
        output = lines_of(client, ended.output_file_id)
        errors = lines_of(client, ended.error_file_id)
        bad = {"bad", "streamed"}
        assert ids_of(output) == [str(x["custom_id"]) for x in lines if x["custom_id"] not in bad]
        assert ids_of(errors) == ["bad", "streamed"]
        assert [line["response"]["status_code"] for line in errors] == [400, 400]
        assert errors[0]["response"]["body"]["error"]["param"] == "temperature"
        assert len(output[7]["response"]["body"]["choices"]) == 4
        single = [line for line in output if line["custom_id"] != "two"]
        for line in single:
            body = line["response"]["body"]
            assert body["choices"][0]["text"] == "word0 word1 word2"
            assert body["usage"]["completion_tokens"] == 3
        assert len({line["response"]["body"]["fabric"]["site"] for line in single}) == 2
        two = {run["run"] for run in output[7]["response"]["body"]["fabric"]["runs"]}
        assert charges_of(hub) == Counter(runs_of(single) | two)
        spent = -sum(
            x.amount_usu for x in hub.ledger.statement(PROJECT).lines if x.kind == "charge"
        )
        assert ended.fabric["charge_usu"] == spent > 0  # type: ignore[attr-defined]
        assert not [account for account in hub.ledger.allocations(PROJECT) if account.held_usu]


def test_a_batch_of_conversations(client: OpenAI) -> None:
    messages = [{"role": "user", "content": "Name a metal."}]
    batch = submit(client, request("a", CHAT, messages=messages), endpoint=CHAT)
    ended = wait(client, batch)
    [line] = lines_of(client, ended.output_file_id)
    assert line["response"]["body"]["object"] == "chat.completion"
    assert line["response"]["body"]["choices"][0]["message"]["content"] == "word0 word1 word2"
    assert ended.error_file_id is None


@pytest.mark.parametrize(
    ("content", "code", "line"),
    [
        (b"\n \n", "empty_file", None),
        (jsonl(request("a")) + b'{"custom_id": \n', "invalid_json_line", 2),
        (b'{"custom_id": "\xff"}\n', "invalid_json_line", 1),
        (b"[1]\n", "invalid_json_line", 1),
        (b'{"a": NaN}\n', "invalid_json_line", 1),
        (b"[" * 60_000 + b"\n", "invalid_json_line", 1),
        (jsonl(request("a"), request("b"), request("a")), "duplicate_custom_id", 3),
        (jsonl(request("a"), request("b", model="other")), "mismatched_model", 2),
        (jsonl(request("a", model="unheard-of")), "model_not_found", 1),
        (jsonl(request("a", CHAT, messages=[])), "invalid_url", 1),
        (jsonl({**request("a"), "method": "GET"}), "invalid_method", 1),
        (jsonl({**request("a"), "body": None}), "invalid_body", 1),
        (jsonl({**request("a"), "custom_id": 7}), "invalid_custom_id", 1),
        (jsonl({**request("a"), "more": 7}), "unknown_parameter", 1),
        (jsonl(request("a", prompt="x" * 70_000)), "line_too_long", 1),
        (jsonl(*(request(str(i)) for i in range(201))), "too_many_lines", 201),
    ],
)
def test_an_input_that_is_not_valid_fails_the_batch(
    client: OpenAI, hub: RunningHub, content: bytes, code: str, line: int | None
) -> None:
    before = charges_of(hub)
    batch = client.batches.create(
        input_file_id=upload(client, content).id, endpoint=COMPLETIONS, completion_window="24h"
    )
    ended = wait(client, batch)
    assert (ended.status, ended.output_file_id, ended.error_file_id) == ("failed", None, None)
    assert ended.errors is not None
    assert ended.errors.data is not None
    assert (ended.errors.data[0].code, ended.errors.data[0].line) == (code, line)
    assert ended.failed_at is not None
    assert charges_of(hub) == before


def test_bad_batches_are_refused(client: OpenAI) -> None:
    good: Any = {
        "input_file_id": upload(client, jsonl(request("a"))).id,
        "completion_window": "24h",
    }
    for wrong, param in (
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"metadata": {"a": 1}}, "metadata.a"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.batches.create(**{"endpoint": COMPLETIONS, **good, **wrong})
        assert caught.value.param == param
    with pytest.raises(openai.NotFoundError):
        client.batches.create(
            input_file_id="file_none", endpoint=COMPLETIONS, completion_window="24h"
        )


# ---- what may happen in the middle ---------------------------------------------------------------


def slow() -> FixedDelayEngine:
    return FixedDelayEngine(first_token_s=0.05, token_s=0.01)


def stuck() -> FixedDelayEngine:
    return FixedDelayEngine(first_token_s=0.02, token_s=600.0)


def test_a_cancelled_batch_keeps_what_was_answered(tmp_path: Path) -> None:
    with (
        running_hub(tmp_path, batches=LIMITS, engine=slow) as hub,
        client_of(hub) as client,
    ):
        batch = submit(client, *(request(f"line-{i}") for i in range(200)))
        with pytest.raises(openai.ConflictError):
            client.files.delete(batch.input_file_id)
        wait(client, batch, lambda batch: done(batch) > 0)
        for _ in range(2):
            assert client.batches.cancel(batch.id).status in {"cancelling", "cancelled"}
            if client.batches.retrieve(batch.id).status == "cancelled":
                break
        ended = wait(client, batch)
        assert ended.status == "cancelled"
        output = lines_of(client, ended.output_file_id)
        errors = lines_of(client, ended.error_file_id)
        assert sorted(ids_of(output) + ids_of(errors)) == sorted(f"line-{i}" for i in range(200))
        assert 0 < len(output) == done(ended) < 200
        assert {line["error"]["code"] for line in errors} == {"batch_cancelled"}
        assert_each_charged_once(hub, output)
        assert not [account for account in hub.ledger.allocations(PROJECT) if account.held_usu]
        with pytest.raises(openai.ConflictError):
            client.batches.cancel(batch.id)
        client.files.delete(batch.input_file_id)


@pytest.mark.slow
def test_a_hub_that_ends_leaves_its_batch_to_the_next(tmp_path: Path) -> None:
    with running_hub(tmp_path, batches=LIMITS, engine=slow) as hub, client_of(hub) as client:
        batch = submit(client, *(request(f"line-{i}") for i in range(120)))
        wait(client, batch, lambda batch: done(batch) > 5)
    with running_hub(tmp_path, batches=LIMITS, engine=slow) as hub, client_of(hub) as client:
        num_before = done(client.batches.retrieve(batch.id))
        assert num_before > 5
        ended = wait(client, batch)
        output = lines_of(client, ended.output_file_id)
        assert (ended.status, ended.error_file_id) == ("completed", None)
        assert ids_of(output) == [f"line-{i}" for i in range(120)]
        assert_each_charged_once(hub, output)


HUB = """
import sys
from pathlib import Path
from fabric.batches import BatchSettings
from fabric.testing.engine import FixedDelayEngine
from fabric.testing.hub import running_hub

limits = BatchSettings(poll_s=0.05, lease_s=1.0)
engine = lambda: FixedDelayEngine(first_token_s=0.05, token_s=0.01)
with running_hub(Path(sys.argv[1]), batches=limits, engine=engine) as hub:
    print(hub.openai_url, hub.api_key, flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
def test_a_hub_that_is_killed_loses_and_charges_nothing_twice(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", HUB, str(tmp_path)]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url, key = process.stdout.readline().split()
        with OpenAI(base_url=url, api_key=key, max_retries=0, timeout=30) as client:
            batch = submit(client, *(request(f"line-{i}") for i in range(150)))
            wait(client, batch, lambda batch: done(batch) > 20)
    finally:
        process.kill()
        process.wait()
        process.stdin.close()  # type: ignore[union-attr]
        process.stdout.close()  # type: ignore[union-attr]
    with running_hub(tmp_path, batches=LIMITS, engine=slow) as hub, client_of(hub) as client:
        assert 20 < done(client.batches.retrieve(batch.id)) < 150
        ended = wait(client, batch)
        output = lines_of(client, ended.output_file_id)
        assert (ended.status, ended.error_file_id) == ("completed", None)
        assert ids_of(output) == [f"line-{i}" for i in range(150)]
        assert_each_charged_once(hub, output)


@pytest.mark.slow
def test_two_batches_at_once_and_a_site_that_is_killed(tmp_path: Path) -> None:
    with (
        running_hub(tmp_path, batches=LIMITS, engine=slow) as hub,
        client_of(hub) as client,
    ):
        pair = [
            submit(client, *(request(f"{name}-{i}") for i in range(100))) for name in ("a", "b")
        ]
        for batch in pair:
            wait(client, batch, lambda batch: done(batch) > 0)
        hub.kill_site("alpha")
        outputs = []
        for name, batch in zip(("a", "b"), pair, strict=True):
            ended = wait(client, batch)
            assert (ended.status, ended.error_file_id) == ("completed", None)
            outputs.append(lines_of(client, ended.output_file_id))
            assert ids_of(outputs[-1]) == [f"{name}-{i}" for i in range(100)]
        assert_each_charged_once(hub, [*outputs[0], *outputs[1]])
        first = client.batches.list(limit=1)
        assert [one.id for one in first] == [pair[1].id, pair[0].id]


def test_a_revoked_key_ends_its_batch(tmp_path: Path) -> None:
    with (
        running_hub(tmp_path, batches=LIMITS, engine=stuck) as hub,
        client_of(hub) as client,
    ):
        record, key = hub.keys.add_key(PROJECT)
        with client_of(hub, key) as other:
            batch = submit(other, request("a"), request("b"))
            wait(client, batch, lambda batch: batch.status == "in_progress")
            hub.keys.revoke(record.id)
        ended = wait(client, batch)
        assert ended.status == "failed"
        errors = lines_of(client, ended.error_file_id)
        assert [line["error"]["code"] for line in errors] == ["invalid_api_key"] * 2
        assert not charges_of(hub)


def test_batches_leave_rows_for_others(tmp_path: Path) -> None:
    with (
        running_hub(tmp_path, batches=LIMITS, engine=few_rows, sites=["alpha"]) as hub,
        client_of(hub) as client,
    ):
        batch = submit(client, *(request(f"line-{i}") for i in range(8)))
        engine = hub.sites["alpha"].engine
        wait(client, batch, lambda _: engine.load().num_running == 3)
        reply = client.completions.create(model=MODEL, prompt="x", max_tokens=1)
        assert reply.choices[0].text == "word0"
        assert engine.load().num_running <= 3
        assert client.batches.cancel(batch.id).status == "cancelling"
        assert wait(client, batch).status == "cancelled"


def few_rows() -> FixedDelayEngine:

    limits = Limits(context_tokens=2048, max_rows=4, cache_tokens=8192)
    return FixedDelayEngine(first_token_s=0.02, token_s=600.0, limits=limits)
