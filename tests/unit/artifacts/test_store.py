"""Artifacts: who may have them, how much of them there may be, and until when."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fabric.artifacts import Artifacts, ArtifactSettings
from fabric.auth import Keys
from fabric.errors import ArtifactsFull, BodyTooLarge, Duplicate, NotFound, StorageFull
from fabric.sql import Database, Offload, migrate

NOW = datetime(2026, 1, 1, tzinfo=UTC)
SETTINGS = ArtifactSettings(file_bytes=100, project_bytes=150, ttl_s=60.0)


class Clock:
    now = NOW

    def __call__(self) -> datetime:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def artifacts(tmp_path: Path, clock: Clock) -> AsyncIterator[Artifacts]:
    with Database(f"sqlite:///{tmp_path / 'hub.db'}") as database:
        migrate(database)
        for project in ("astro", "bio"):
            Keys(database).add_project(project)
        offload = Offload(database)
        store = Artifacts(
            database=database,
            offload=offload,
            directory=tmp_path / "artifacts",
            settings=SETTINGS,
            clock=clock,
        )
        await store.start()
        yield store
        await store.close()
        await store.close()
        offload.close()


async def pieces(*data: bytes) -> AsyncIterator[bytes]:
    for piece in data:
        yield piece


def files(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "artifacts").iterdir())


async def test_what_is_kept_is_read_by_its_project_alone(
    artifacts: Artifacts, tmp_path: Path
) -> None:
    record = await artifacts.keep("astro", pieces(b"one", b"two"), run="run_1", part="a")
    assert await artifacts.read(record.id, project="astro") == b"onetwo"
    assert (record.num_bytes, record.run, record.part) == (6, "run_1", "a")
    assert await artifacts.get(record.id, project="astro") == record
    for artifact, project in ((record.id, "bio"), ("art_" + "0" * 32, "astro")):
        with pytest.raises(NotFound):
            await artifacts.get(artifact, project=project)
        with pytest.raises(NotFound):
            await artifacts.delete(artifact, project=project)
    (path,) = (tmp_path / "artifacts").iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


async def test_equal_contents_are_kept_once_and_until_the_last_of_them_is_gone(
    artifacts: Artifacts, tmp_path: Path
) -> None:
    first = await artifacts.keep("astro", pieces(b"same"))
    second = await artifacts.keep("bio", pieces(b"same"))
    assert files(tmp_path) == [first.sha256]
    await artifacts.delete(first.id, project="astro")
    assert await artifacts.read(second.id, project="bio") == b"same"
    await artifacts.delete(second.id, project="bio")
    assert files(tmp_path) == []


async def test_what_has_expired_is_gone_and_swept(
    artifacts: Artifacts, clock: Clock, tmp_path: Path
) -> None:
    old = await artifacts.keep("astro", pieces(b"old"))
    clock.advance(30)
    young = await artifacts.keep("astro", pieces(b"young"))
    clock.advance(30)
    with pytest.raises(NotFound):
        await artifacts.read(old.id, project="astro")
    (tmp_path / "artifacts" / "orphan").write_bytes(b"x")
    artifacts.sweep()
    assert files(tmp_path) == [young.sha256]


async def test_a_projects_artifacts_have_a_limit_that_expired_ones_leave(
    artifacts: Artifacts, clock: Clock, tmp_path: Path
) -> None:
    await artifacts.keep("astro", pieces(b"a" * 100))
    with pytest.raises(ArtifactsFull) as full:
        await artifacts.keep("astro", pieces(b"b" * 51))
    assert full.value.detail == {"num_bytes": 151, "limit_bytes": 150}
    assert len(files(tmp_path)) == 1
    await artifacts.keep("bio", pieces(b"b" * 51))
    clock.advance(60)
    await artifacts.keep("astro", pieces(b"b" * 51))


async def test_two_at_once_cannot_pass_the_limit_together(artifacts: Artifacts) -> None:
    kept = await asyncio.gather(
        *(artifacts.keep("astro", pieces(bytes([n]) * 60)) for n in range(6)),
        return_exceptions=True,
    )
    assert sum(isinstance(one, ArtifactsFull) for one in kept) == 4


async def test_contents_over_the_limit_are_cut_off(artifacts: Artifacts, tmp_path: Path) -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 40

    with pytest.raises(BodyTooLarge):
        await artifacts.keep("astro", endless())
    with pytest.raises(BodyTooLarge):
        await artifacts.keep("astro", pieces(b"x" * 11), limit_bytes=10)
    assert files(tmp_path) == []


async def test_a_run_keeps_no_more_than_it_may_in_all_its_parts(artifacts: Artifacts) -> None:
    await artifacts.keep("astro", pieces(b"x" * 6), run="run_1", limit_bytes=10)
    with pytest.raises(BodyTooLarge):
        await artifacts.keep("astro", pieces(b"y" * 6), run="run_1", limit_bytes=10)
    await artifacts.keep("astro", pieces(b"y" * 6), run="run_2", limit_bytes=10)


async def test_an_id_is_taken_once(artifacts: Artifacts) -> None:
    name = "art_" + "1" * 32
    await artifacts.keep("astro", pieces(b"mine"), artifact_id=name)
    with pytest.raises(Duplicate):
        await artifacts.keep("bio", pieces(b"other"), artifact_id=name)
    assert await artifacts.read(name, project="astro") == b"mine"


@pytest.mark.parametrize("kill", [asyncio.CancelledError, ConnectionError])
async def test_what_breaks_off_leaves_nothing(
    artifacts: Artifacts, tmp_path: Path, kill: Callable[[], BaseException]
) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"begun"
        raise kill()

    with pytest.raises((asyncio.CancelledError, StorageFull)):
        await artifacts.keep("astro", broken())
    assert files(tmp_path) == []


async def test_contents_that_vanished_are_not_found(artifacts: Artifacts) -> None:
    record = await artifacts.keep("astro", pieces(b"x"))
    artifacts.path(record).unlink()
    with pytest.raises(NotFound):
        await artifacts.read(record.id, project="astro")
