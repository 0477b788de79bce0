"""The runner over a real database, with an answerer that does as it is told."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from uuid import uuid4

import pytest
from sqlalchemy import update

from fabric.auth import Identity, Keys, Users
from fabric.batches import Batches, BatchRecord, BatchSettings, Rows
from fabric.batches.answerer import Write
from fabric.batches.records import Json
from fabric.batches.tables import batches as table
from fabric.batches.tables import files
from fabric.errors import FabricError, InsufficientBalance, NoReplica, RowFailed, UnknownModel
from fabric.sql import Database, Offload, utc_now

ENDPOINT = "/v1/completions"
PROJECT = "physics"


@dataclass
class FakeAnswer:
    """An answer of 5 micro-SU that notes whether it was charged."""

    request_id: str
    body: Json
    answerer: FakeAnswerer
    charge_usu: int = 5

    async def keep(self, write: Write) -> None:
        if await self.answerer.offload(write):
            self.answerer.charged.append(self.request_id)


@dataclass
class FakeAnswerer:
    """Answers at once, unless ``before`` raises or waits."""

    offload: Offload
    num_rows: int = 8
    num_busy: int = 0
    num_asked: int = 0
    most_at_once: int = 0
    charged: list[str] = field(default_factory=list)
    before: Callable[[str], None] = lambda _: None
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    at_once: int = 0

    async def find(self, _caller: Identity, model: str) -> str:
        if model != "m":
            raise UnknownModel(model=model, known=["m"])
        return "m@1"

    def rows(self, model: str) -> Rows:
        return Rows(self.num_rows, self.num_busy + self.at_once)

    async def answer(
        self, caller: Identity, endpoint: str, body: Json, *, seed: str, deadline_s: float
    ) -> FakeAnswer:
        self.num_asked += 1
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await self.gate.wait()
            self.before(str(body["prompt"]))
            return FakeAnswer(seed, {"said": body["prompt"]}, self)
        finally:
            self.at_once -= 1

    def refusal(self, error: FabricError) -> Json:
        return {"error": {"code": error.code}}


@dataclass
class Bench:
    """A room, its answerer, and one caller."""

    database: Database
    directory: Path
    offload: Offload
    keys: Keys
    caller: Identity
    answerer: FakeAnswerer

    @asynccontextmanager
    async def batches(self, **settings: float) -> AsyncIterator[Batches]:
        fields = {"poll_s": 0.02, "lease_s": 0.5, "max_backoff_s": 0.05, **settings}
        room = Batches(
            database=self.database,
            offload=self.offload,
            keys=self.keys,
            answerer=self.answerer,
            directory=self.directory,
            settings=BatchSettings(**fields),  # type: ignore[arg-type]
        )
        await room.start()
        try:
            yield room
        finally:
            await room.close()

    async def create(self, room: Batches, num_lines: int) -> BatchRecord:
        lines = [
            {
                "custom_id": f"line-{i}",
                "method": "POST",
                "url": ENDPOINT,
                "body": {"model": "m", "prompt": str(i)},
            }
            for i in range(num_lines)
        ]
        content = io.BytesIO("\n".join(json.dumps(line) for line in lines).encode())
        file = room.upload(PROJECT, content, filename="x", ttl_s=None)
        return await room.create(self.caller, input_file=file.id, endpoint=ENDPOINT, metadata={})

    async def over(self, room: Batches, batch: BatchRecord) -> BatchRecord:
        async with asyncio.timeout(30):
            while (now := room.book.get(batch.id)).ended_at is None:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        return now


@pytest.fixture
async def bench(database: Database, tmp_path: Path) -> AsyncIterator[Bench]:
    keys, offload = Keys(database), Offload(database)
    keys.add_project(PROJECT)
    record, _ = keys.add_key(PROJECT)
    caller = Identity(key_id=record.id, project=PROJECT, scopes=record.scopes, max_concurrent=64)
    answerer = FakeAnswerer(offload)
    answerer.gate.set()
    yield Bench(database, tmp_path / "files", offload, keys, caller, answerer)
    offload.close()


def lines_of(room: Batches, file_id: str | None) -> list[Json]:
    assert file_id is not None
    return [json.loads(line) for line in room.files.path(file_id).read_text().splitlines()]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_lines_take_no_more_rows_than_their_share(bench: Bench) -> None:
    bench.answerer.num_busy = 2
    async with bench.batches(share=0.75) as room:
        await bench.over(room, await bench.create(room, 40))
        await until(lambda: not room.book.prune())
    assert 1 <= bench.answerer.most_at_once <= 8 * 0.75 - 2


async def test_a_line_waits_for_a_model_that_is_not_there_and_is_answered(bench: Bench) -> None:
    tries: list[str] = []

    def absent(prompt: str) -> None:
        tries.append(prompt)
        if len(tries) < 20:
            raise NoReplica(model="m", reasons={})

    bench.answerer.before = absent
    async with bench.batches(max_tries=2) as room:
        ended = await bench.over(room, await bench.create(room, 1))
    assert (ended.status, ended.num_completed, ended.charge_usu) == ("completed", 1, 5)


async def test_who_is_kept_out_has_no_more_lines_asked(bench: Bench) -> None:
    bench.caller = replace(bench.caller, key_id=f"globus:{uuid4()}")
    users = Users(bench.database)
    users.note_login(bench.caller.key_id.removeprefix("globus:"), "alice@example.edu")
    bench.answerer.gate.clear()
    async with bench.batches() as room:
        batch = await bench.create(room, 3)
        await until(lambda: bench.answerer.at_once > 0)
        users.block("alice@example.edu", reason="left")
        ended = await bench.over(room, batch)
        assert ended.status == "failed"
        codes = {line["error"]["code"] for line in lines_of(room, ended.error_file)}
        assert codes == {"user_blocked"}


async def test_a_line_that_cannot_be_paid_is_an_error_and_the_others_are_answered(
    bench: Bench,
) -> None:
    def dear(prompt: str) -> None:
        if prompt == "1":
            raise InsufficientBalance(account="a", needed_usu=2, available_usu=1)
        if prompt == "2":
            raise RowFailed(reason="it broke")

    bench.answerer.before = dear
    async with bench.batches() as room:
        ended = await bench.over(room, await bench.create(room, 4))
        errors = lines_of(room, ended.error_file)
    assert (ended.status, ended.num_completed, ended.num_failed) == ("completed", 2, 2)
    assert [error["custom_id"] for error in errors] == ["line-1", "line-2"]
    assert len(bench.answerer.charged) == 2


async def test_a_batch_expires_with_what_was_answered(bench: Bench) -> None:
    bench.answerer.num_rows = 0
    async with bench.batches() as room:
        batch = await bench.create(room, 3)
        await until(lambda: room.book.get(batch.id).status == "in_progress")
    soon = utc_now() + timedelta(seconds=0.1)
    with bench.database.transaction() as connection:
        connection.execute(update(table).values(expires_at=soon))
    async with bench.batches() as room:
        ended = await bench.over(room, batch)
        errors = lines_of(room, ended.error_file)
    assert (ended.status, ended.output_file, ended.num_failed) == ("expired", None, 3)
    assert [error["error"]["code"] for error in errors] == ["batch_expired"] * 3  # type: ignore[index]


async def test_of_two_hubs_one_works_on_a_batch_and_the_other_takes_it_over(bench: Bench) -> None:
    bench.answerer.gate.clear()
    async with bench.batches() as first, bench.batches() as second:
        batch = await bench.create(first, 20)
        await until(lambda: bench.answerer.num_asked > 0)
        assert first.book.get(batch.id).life == 1
        await first.close()
        bench.answerer.gate.set()
        ended = await bench.over(second, batch)
        output = lines_of(second, ended.output_file)
    assert (ended.status, ended.life) == ("completed", 2)
    assert [line["custom_id"] for line in output] == [f"line-{i}" for i in range(20)]
    assert len(bench.answerer.charged) == 20


async def test_a_result_that_comes_twice_is_kept_and_charged_once(bench: Bench) -> None:
    bench.answerer.num_rows = 0
    async with bench.batches() as room:
        batch = await bench.create(room, 2)
        await until(lambda: room.book.get(batch.id).status == "in_progress")
        assert room.book.finish_line(batch.id, 1, "{}", charge_usu=5)
        assert not room.book.finish_line(batch.id, 1, "{}", charge_usu=5)
        assert not room.book.finish_line(batch.id, 7, "{}", charge_usu=5)
        now = room.book.get(batch.id)
    assert (now.num_completed, now.charge_usu) == (1, 5)


async def test_expired_files_go_but_not_those_that_are_read(bench: Bench) -> None:
    bench.answerer.num_rows = 0
    async with bench.batches() as room:
        batch = await bench.create(room, 1)
        idle = room.upload(PROJECT, io.BytesIO(b"x"), filename="x", ttl_s=None)
        with bench.database.transaction() as connection:
            connection.execute(update(files).values(expires_at=utc_now()))
        assert not room.files.listed(PROJECT)
        room.files.sweep()
        with bench.database.read() as connection:
            assert connection.exec_driver_sql("SELECT id FROM files").scalars().all() == [
                batch.input_file
            ]
        assert room.files.path(batch.input_file).exists()
        assert idle.id != batch.input_file


async def test_a_project_with_many_batches_does_not_keep_others_waiting(bench: Bench) -> None:
    bench.answerer.num_rows = 0
    bench.keys.add_project("other")
    async with bench.batches(num_batches=8) as room:
        many = [await bench.create(room, 1) for _ in range(12)]
        with bench.database.transaction() as connection:
            last = table.c.id == many[-1].id
            connection.execute(update(table).where(last).values(project="other"))
        await until(lambda: room.book.get(many[-1].id).life == 1)
        assert sum(room.book.get(batch.id).life for batch in many[:-1]) == 2


async def test_the_batch_that_is_due_first_gets_the_rows_first(bench: Bench) -> None:
    bench.answerer.num_rows = 0
    async with bench.batches() as room:
        late, soon = await bench.create(room, 6), await bench.create(room, 6)
        await until(lambda: room.book.get(soon.id).status == "in_progress")
        await until(lambda: room.book.get(late.id).status == "in_progress")
    with bench.database.transaction() as connection:
        due_at = late.expires_at - timedelta(hours=1)
        connection.execute(update(table).where(table.c.id == soon.id).values(expires_at=due_at))
    async with bench.batches() as room:
        await until(lambda: all(room.book.get(one.id).life == 2 for one in (late, soon)))
        bench.answerer.num_rows = 1
        await bench.over(room, late)
        assert (await bench.over(room, soon)).num_completed == 6
    order = [seed.partition(":")[0] for seed in bench.answerer.charged]
    # Whichever was taken up first may have had one row before the other waited.
    assert order[1:6] == [soon.id] * 5
    assert order[7:] == [late.id] * 5
