"""Batches on real instances, delivered by the registered functions' own source."""

import asyncio
import base64
import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from pydantic import TypeAdapter

from fabric.config import FileStore, save_store
from fabric.errors import RequestInvalid, TicketInvalid
from fabric.launch import answers
from fabric.messages import (
    Cancel,
    Drain,
    Event,
    Failure,
    InstanceSpec,
    Metered,
    Redeem,
    Redeemed,
    Settled,
    Task,
)
from fabric.payloads import PayloadStore, unpack
from fabric.programs import read_header
from fabric.testing.rig import get_spec, serve_hub_end

MODEL = "fixed@1"
EVENTS = TypeAdapter(list[list[Event]])
LONG_TOKENS = 1500
PATIENCE_S = 60.0


def get_task(digest: str, id: str = "run_1", *, max_tokens: int = 3, **more: object) -> dict:
    request = {
        "id": id,
        "model": MODEL,
        "input": {"kind": "text", "text": "hi there"},
        "sampling": {"max_tokens": max_tokens, **more},
    }
    return {"id": id, "attempt": 1, "request": request, "digest": digest, "deadline_s": 60}


def texts(answer: dict) -> list[str]:
    return ["".join(event.get("text", "") for event in events) for events in answer["events"]]


def ends(answer: dict) -> list[str]:
    return [
        events[-1]["failure"]["code"] if events[-1]["type"] == "failed" else "finished"
        for events in answer["events"]
    ]


class Served:
    """A ready instance and its batches."""

    def __init__(self, site, spec: InstanceSpec) -> None:
        self.site, self.spec = site, spec
        self.described = site.start_ready(spec)
        self.digest = self.described["hello"]["digest"]
        self.hub = {"instance": spec.launch.instance, "token": spec.direct_token}

    def infer(self, *tasks: dict, **fields: object) -> dict:
        return self.site.call("infer", {**self.hub, "tasks": list(tasks), **fields})

    @contextmanager
    def running(self, *tasks: dict) -> Iterator[list[dict]]:
        """Run a batch beside the block; the answer is in the list after it."""
        answers: list[dict] = []
        thread = threading.Thread(target=lambda: answers.append(self.infer(*tasks)))
        thread.start()
        yield answers
        thread.join(PATIENCE_S)
        assert len(answers) == 1

    def wait_for_load(self, num_running: int) -> None:
        until = time.monotonic() + PATIENCE_S
        while self.infer(describe=True)["heartbeat"]["load"]["num_running"] < num_running:
            assert time.monotonic() < until


@pytest.fixture
def served(site, tmp_path: Path) -> Served:
    return Served(site, get_spec(tmp_path, engine="token_s=0.001", model=MODEL))


@pytest.fixture
def slow(site, tmp_path: Path) -> Served:
    return Served(site, get_spec(tmp_path, engine="token_s=0.05", model=MODEL))


@pytest.fixture
def fast(site, tmp_path: Path) -> Served:
    return Served(site, get_spec(tmp_path, engine="context_tokens=200000", model=MODEL))


# ---- the hub's batches -----------------------------------------------------------------------


def test_tasks_of_a_batch_come_back_in_order(served) -> None:
    tasks = [get_task(served.digest, f"run_{n}", max_tokens=n) for n in (3, 1, 2)]
    answer = served.infer(*tasks)
    assert texts(answer) == ["word0 word1 word2", "word0", "word0 word1"]
    assert "error" not in answer


def test_tasks_of_a_batch_run_at_once(slow) -> None:
    tasks = [get_task(slow.digest, f"run_{n}", max_tokens=LONG_TOKENS) for n in range(3)]
    with slow.running(*tasks):
        slow.wait_for_load(3)
        cancels = [Cancel(task_id=f"run_{n}", attempt=1) for n in range(3)]
        slow.infer(frames=[cancel.model_dump(mode="json") for cancel in cancels])


def test_events_are_compact_and_whole(served) -> None:
    answer = json.loads(json.dumps(served.infer(get_task(served.digest))))
    ((accepted, *tokens, finished),) = EVENTS.validate_python(answer["events"])
    assert accepted.prompt_tokens == 2
    assert [token.position for token in tokens] == [0, 1, 2]
    assert finished.usage.output_tokens == 3
    assert "top_logprobs" not in answer["events"][0][1], "defaults take no room"


def test_an_instance_describes_itself_when_asked(served) -> None:
    answer = served.infer(describe=True)
    assert answer["hello"]["instance"] == served.spec.launch.instance
    assert answer["heartbeat"]["state"] == "ready"
    assert answer["events"] == []
    assert served.infer()["hello"] is None


def test_a_cancel_ends_what_another_worker_runs(slow) -> None:
    with slow.running(get_task(slow.digest, max_tokens=LONG_TOKENS)) as answers:
        slow.wait_for_load(1)
        slow.infer(frames=[Cancel(task_id="run_1", attempt=1).model_dump(mode="json")])
    assert ends(answers[0]) == ["request_cancelled"]


def test_a_drain_ends_the_instance_after_its_tasks(site, tmp_path) -> None:
    spec = get_spec(tmp_path, model=MODEL)
    ended = site.start(spec)
    site.wait_ready(spec.launch.instance)
    drain = Drain(reason="enough").model_dump(mode="json")
    batch = {"instance": spec.launch.instance, "token": spec.direct_token, "frames": [drain]}
    assert "error" not in site.call("infer", batch)
    assert ended.result(PATIENCE_S)["exit_code"] == 0


def test_one_failed_task_leaves_the_others(served) -> None:
    wrong = get_task("sha256:" + "1" * 64, "run_wrong")
    answer = served.infer(get_task(served.digest), wrong, get_task(served.digest, "run_2"))
    assert ends(answer) == ["finished", "digest_mismatch", "finished"]


def test_what_is_finished_is_not_lost_with_its_instance(slow) -> None:
    tasks = [get_task(slow.digest), get_task(slow.digest, "run_2", max_tokens=LONG_TOKENS)]
    with slow.running(*tasks) as answers:
        slow.wait_for_load(1)
        slow.infer(get_task(slow.digest, "run_3", max_tokens=30))  # outlasts the first
        psutil.Process(slow.described["pid"]).kill()
    assert ends(answers[0]) == ["finished", "session_lost"]
    assert len(answers[0]["events"][1]) > 2, "the tokens that came are kept"


def test_an_instance_that_is_gone_fails_each_task(served) -> None:
    served.site.call("stop_instance", served.spec.launch.instance)
    until = time.monotonic() + PATIENCE_S
    while served.site.call("describe_site")["instances"]:
        assert time.monotonic() < until
        time.sleep(0.05)
    answer = served.infer(get_task(served.digest), get_task(served.digest, "run_2"))
    assert Failure.model_validate(answer["error"]).to_error().retryable
    assert ends(answer) == ["session_lost", "session_lost"]
    assert [events[0]["task_id"] for events in answer["events"]] == ["run_1", "run_2"]


def test_a_wrong_token_is_refused(served) -> None:
    answer = served.infer(get_task(served.digest), token="wrong")
    assert answer["error"]["code"] == "session_refused"
    assert ends(answer) == ["session_refused"]


def test_an_instance_of_another_machine_is_named(served) -> None:
    path = served.site.instances / f"{served.spec.launch.instance}.place"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"host": "node7"}))
    assert "reached from node7 only" in served.infer()["error"]["message"]


@pytest.mark.parametrize(
    "batch",
    [
        {"tasks": "all"},
        {"tasks": [1]},
        {"token": "t", "tasks": [{"id": "run_1"}]},
        {"token": "t", "frames": [{"type": "task"}]},
        {"frames": [{"type": "drain", "reason": "mine"}]},
        {"instance": 3},
        {"instance": "../x", "token": "t"},
        {"surprise": True},
    ],
)
def test_a_batch_that_makes_no_sense_is_refused(site, batch) -> None:
    try:
        answer = site.call("infer", batch)
    except RequestInvalid:
        return
    assert answer["error"]["code"] == "invalid_parameter"


# ---- large answers ---------------------------------------------------------------------------


def test_an_answer_over_the_cap_fails_the_largest_tasks_alone(fast) -> None:
    """12 MB: what the service would drop without a word."""
    long = get_task(fast.digest, "run_long", max_tokens=70_000, logprobs=0)
    answer = fast.infer(get_task(fast.digest), long, get_task(fast.digest, "run_3"))
    assert len(json.dumps(answer)) < answers.CAP_BYTES
    assert ends(answer) == ["finished", "payload_too_large", "finished"]
    failed = answer["events"][1][-1]
    assert failed["failure"]["detail"]["cap_bytes"] == answers.CAP_BYTES
    assert failed["usage"]["output_tokens"] == 70_000, "what was computed is told"


def test_an_answer_over_the_cap_goes_to_the_sites_store(fast, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(answers, "CAP_BYTES", 100_000)
    config = FileStore(kind="file", name="scratch", directory=tmp_path / "store")
    save_store(config, Path(fast.site.run_dir))
    tasks = [get_task(fast.digest, f"run_{n}", max_tokens=LONG_TOKENS) for n in range(2)]
    answer = fast.infer(*tasks)
    assert list(answer) == ["$ref"]
    assert len(json.dumps(answer)) < 2000
    with PayloadStore(config) as store:
        whole = unpack(answer, [store], evict=True)
    assert ends(whole) == ["finished", "finished"]
    assert texts(whole)[0].endswith(f" word{LONG_TOKENS - 1}")


def test_a_store_that_does_not_work_is_named(fast, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(answers, "CAP_BYTES", 100_000)
    (tmp_path / "store").write_text("not a directory")
    config = FileStore(kind="file", name="scratch", directory=tmp_path / "store")
    save_store(config, Path(fast.site.run_dir))
    answer = fast.infer(get_task(fast.digest, max_tokens=LONG_TOKENS))
    assert ends(answer) == ["store_unreachable"]


# ---- raw calls -------------------------------------------------------------------------------


class Till:
    """A hub's end that knows one ticket."""

    def __init__(self) -> None:
        self.redeemed: list[Redeem] = []
        self.metered: list[Metered] = []

    async def redeem(self, frame: Redeem) -> Redeemed:
        self.redeemed.append(frame)
        known = frame.ticket == "fabt_good"
        failure = None if known else Failure.of(TicketInvalid())
        return Redeemed(task_id=frame.task_id, attempt=frame.attempt, failure=failure)

    async def settle(self, frame: Metered) -> Settled:
        self.metered.append(frame)
        return Settled(task_id=frame.task_id, attempt=frame.attempt)

    async def wait_for_metered(self, count: int) -> list[Metered]:
        """Return what was metered when there is so much: a site answers before it is heard here."""
        until = time.monotonic() + PATIENCE_S
        while len(self.metered) < count:
            assert time.monotonic() < until
            await asyncio.sleep(0.02)
        return self.metered


@pytest.fixture
async def till(site, tmp_path):
    """A ready instance whose hub keeps a till."""
    async with serve_hub_end() as hub:
        spec = get_spec(tmp_path, session_url=hub.url, model=MODEL)
        ended = site.start(spec)
        channel = await hub.accept(PATIENCE_S)
        channel.till = Till()
        yield channel.till
        await channel.drain("done")
        await asyncio.to_thread(ended.result, PATIENCE_S)


async def ask(site, items: Sequence[object], **fields: object) -> dict:
    batch = {"model": "fixed", "ticket": "fabt_good", "tasks": list(items), **fields}
    return await asyncio.to_thread(site.call, "infer", batch)


async def test_a_raw_call_is_answered_plainly_and_metered(site, till) -> None:
    chat = [{"role": "user", "content": "hi you"}]
    answer = await ask(
        site,
        [
            {"prompt": "a b c", "max_tokens": 2},
            {"messages": chat, "max_tokens": 1, "temperature": 0},
            {"prompt": [1, 2], "max_tokens": 1, "n": 2, "seed": 7, "stop": "never"},
            {
                "model": "fixed",
                "input": {"kind": "text", "text": "x"},
                "sampling": {"max_tokens": 1},
            },
        ],
    )
    first, second, third, fourth = answer["results"]
    assert (first["text"], first["finish_reason"]) == ("word0 word1", "length")
    assert (first["usage"]["prompt_tokens"], first["usage"]["output_tokens"]) == (3, 2)
    assert second["usage"]["prompt_tokens"] == 3
    assert [choice["text"] for choice in third["choices"]] == ["word0", "word0"]
    assert fourth["text"] == "word0"
    assert len(answer["events"]) == 4
    assert [frame.ticket for frame in till.redeemed] == ["fabt_good"] * 4
    metered = await till.wait_for_metered(4)
    assert sum(frame.usage.output_tokens for frame in metered) == 2 + 1 + 2 + 1


async def test_each_item_has_its_own_error(site, till) -> None:
    answer = await ask(
        site,
        [
            {"prompt": "x", "max_tokens": 1},
            {"prompt": "x", "max_tokens": -1},
            {"prompt": "x", "max_token": 1},
            {"prompt": 3},
            {},
            {"prompt": "x", "messages": []},
            {"prompt": "x", "model": "other"},
            {"messages": [{"role": "wizard", "content": "x"}]},
            {"prompt": "x", "max_tokens": 5000},
        ],
    )
    good, *bad = answer["results"]
    assert good["text"] == "word0"
    assert [result["error"]["code"] for result in bad] == [
        "invalid_parameter",
        "unknown_parameter",
        *["invalid_parameter"] * 5,
        "context_length_exceeded",
    ]
    named = ["'max_tokens'", "'max_token'", "'prompt'", "'prompt'", "'prompt'", "'model'"]
    for name, result in zip([*named, "'messages.0.role'"], bad, strict=False):
        assert name in result["error"]["message"].replace("chat.", "")


async def test_a_ticket_that_is_not_known_pays_for_nothing(site, till) -> None:
    answer = await ask(site, [{"prompt": "x", "max_tokens": 1}], ticket="fabt_bad")
    assert answer["results"][0]["error"]["code"] == "invalid_ticket"
    answer = await ask(site, [{"prompt": "x", "max_tokens": 1}], ticket=None)
    assert answer["results"][0]["error"]["code"] == "missing_ticket"
    assert till.metered == []


async def test_a_call_that_is_delivered_again_has_the_same_ids(site, till, monkeypatch) -> None:
    monkeypatch.setenv("GC_TASK_UUID", "6cbe4a4e-6a4f-4fbc-9b6a-b5d8f4f6f0b1")
    for _ in range(2):
        await ask(site, [{"prompt": "x", "max_tokens": 1}, {"prompt": "y", "max_tokens": 1}])
    ids = [frame.task_id for frame in till.redeemed]
    assert len(set(ids[:2])) == 2
    assert ids[:2] == ids[2:]


async def test_a_model_that_does_not_run_here_is_told(site, till) -> None:
    answer = await ask(site, [{"prompt": "x"}], model="other")
    assert answer["error"]["code"] == "no_replica"
    assert "it runs fixed@1" in answer["results"][0]["error"]["message"]
    named = await ask(site, [{"prompt": "x", "max_tokens": 1}], model=MODEL)
    assert named["results"][0]["text"] == "word0"


def test_without_an_instance_there_is_no_answer(site) -> None:
    answer = site.call("infer", {"model": "fixed", "tasks": [{"prompt": "x"}]})
    assert answer["results"][0]["error"]["code"] == "no_replica"
    assert site.call("infer", {"tasks": [{"prompt": "x"}]})["error"]["code"] == "invalid_parameter"


# ---- programs --------------------------------------------------------------------------------


def test_a_program_of_the_hubs_is_the_instances_to_refuse(served) -> None:
    task = get_task(served.digest, "run_p")
    task["request"] |= {"mode": "program", "program": {"ops": []}}
    program = {**served.hub, "task": {"type": "task", **task}}
    answer = served.site.call("run_program", program)
    ((failed,),) = answer["events"]
    assert (failed["task_id"], failed["failure"]["code"]) == ("run_p", "protocol_violation")
    assert "request.program" in failed["failure"]["message"]
    assert served.infer(get_task(served.digest))["events"][0][-1]["type"] == "finished"


READ, SAVE = {"op": "read", "at": "layers.1.out"}, {"op": "save", "name": "h", "x": 0}


async def run_program(site, **fields: object) -> dict:
    """Call it beside the loop, which the till needs."""
    asked = {"model": MODEL, "ticket": "fabt_good", **fields}
    return await asyncio.to_thread(site.call, "run_program", asked)


async def test_a_raw_program_pays_by_ticket_and_gets_its_runs(site, till) -> None:
    run = {"id": "a", "text": "two words", "nodes": [READ, SAVE], "gen": {"max_tokens": 2}}
    answer = await run_program(site, program={"runs": [run]}, tier="batch")
    (result,) = answer["results"]
    (told,) = result["runs"]
    assert (told["id"], told["tokens"], told["text"]) == ("a", [1000, 1001], "word0 word1")
    (saves,) = told["saves"]
    assert read_header(base64.b64decode(saves["data"]))["h"].shape == (3, 8)
    assert result["usage"]["hook_bytes_out"] == saves["size"]
    (redeemed,) = till.redeemed
    assert (redeemed.request.mode, redeemed.request.tier) == ("program", "batch")
    (metered,) = await till.wait_for_metered(1)
    assert metered.usage.hook_bytes_out == saves["size"]


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"program": {}}, "invalid_parameter"),
        ({"program": "x"}, "invalid_parameter"),
        ({"program": {"runs": [{"id": "a", "ids": [1], "nodes": [SAVE]}]}}, "program_invalid"),
        ({"program": {"runs": [{"id": "a", "ids": [1]}]}, "tier": "gold"}, "invalid_parameter"),
        ({"program": {"runs": [{"id": "a", "ids": [1]}]}, "model": "other"}, "no_replica"),
        ({"program": {"runs": [{"id": "a", "ids": [1]}]}, "ticket": None}, "missing_ticket"),
    ],
)
async def test_a_raw_program_that_cannot_run_says_why(site, till, fields, code) -> None:
    answer = await run_program(site, **fields)
    assert answer["results"][0]["error"]["code"] == code
    assert [one.usage.output_tokens for one in till.metered] in ([], [0])


def test_a_program_of_a_mode_that_is_supported_is_answered(served) -> None:
    program = {**served.hub, "task": {"type": "task", **get_task(served.digest)}}
    answer = served.site.call("run_program", program)
    assert texts(answer) == ["word0 word1 word2"]


def test_a_program_has_one_task(site) -> None:
    with pytest.raises(RequestInvalid, match=r"program\.tasks"):
        site.call("run_program", {"token": "t", "tasks": []})


@pytest.mark.parametrize("task", [None, {}, {"id": "run_1"}, {"id": 1, "attempt": "x"}, "task"])
def test_a_program_that_is_no_task_is_refused(site, task) -> None:
    with pytest.raises(RequestInvalid, match=r"program\.task"):
        site.call("run_program", {"instance": "inst_1", "token": "t", "task": task})


def test_a_program_for_an_instance_that_is_gone_fails(site) -> None:
    task = Task.model_validate(get_task("sha256:0")).model_dump(mode="json")
    answer = site.call("run_program", {"instance": "inst_1", "token": "t", "task": task})
    assert ends(answer) == ["session_lost"]
