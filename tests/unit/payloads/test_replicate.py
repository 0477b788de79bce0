"""A version's files arrive whole or not at all, from wherever they were left."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import blake3
import numpy as np
import pytest

from fabric.errors import (
    DigestMismatch,
    DiskTooSmall,
    ManifestInvalid,
    PayloadInvalid,
    PayloadMissing,
    ReplicationFailed,
    UnknownStore,
)
from fabric.payloads import PayloadStore, replicate

DIGEST = f"blake3:{'0' * 64}"
SIZES = {"config.json": 200, "weights/model-1.safetensors": 9_000_000, "weights/empty": 0}


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    random = np.random.default_rng(1)
    for path, size_bytes in SIZES.items():
        file = tmp_path / "sources" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(random.bytes(size_bytes))
    return tmp_path / "sources"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


def get_manifest(sources: Path, **changes: Any) -> dict[str, Any]:
    files = [
        {
            "path": path,
            "size_bytes": size_bytes,
            "sha256": hashlib.sha256((sources / path).read_bytes()).hexdigest(),
            "source": str(sources / path),
        }
        for path, size_bytes in SIZES.items()
    ]
    fields = {"name": "tiny", "revision": "1", "digest": DIGEST, "files": files}
    return fields | changes


def with_file(manifest: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return the manifest with a change of its file of weights; ``None`` drops a field."""
    files = [dict(file) for file in manifest["files"]]
    files[1] = {key: item for key, item in (files[1] | changes).items() if item is not None}
    return manifest | {"files": files}


def assert_whole(folder: str | Path, sources: Path) -> None:
    found = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file() and path.name != ".manifest.json"
    }
    assert found == {path: (sources / path).read_bytes() for path in SIZES}


def published(run_dir: Path) -> list[Path]:
    return [path for path in (run_dir / "versions").iterdir() if not path.name.startswith(".")]


def test_files_arrive_and_a_second_call_does_nothing(sources, run_dir) -> None:
    seen: list[tuple[int, int]] = []
    manifest = get_manifest(sources)
    done = replicate(manifest, run_dir, progress=lambda *now: seen.append(now))
    total = sum(SIZES.values())
    assert done == {
        "digest": DIGEST,
        "path": str(published(run_dir)[0]),
        "num_files": 3,
        "size_bytes": total,
        "fetched_bytes": total,
        "present": False,
    }
    assert_whole(done["path"], sources)
    assert seen == sorted(seen)
    assert seen[-1] == (total, total)
    again = replicate(manifest, run_dir)
    assert again == done | {"fetched_bytes": 0, "present": True}


def test_blake3_is_checked_too(sources, run_dir) -> None:
    data = (sources / "weights/model-1.safetensors").read_bytes()
    manifest = with_file(get_manifest(sources), sha256=None, blake3=blake3.blake3(data).hexdigest())
    assert_whole(replicate(manifest, run_dir)["path"], sources)


def test_file_may_come_from_a_store(sources, run_dir, config) -> None:
    data = (sources / "weights/model-1.safetensors").read_bytes()
    with PayloadStore(config) as store:
        reference = store.put(data)
        manifest = with_file(get_manifest(sources), source=reference.model_dump(mode="json"))
        with pytest.raises(UnknownStore):
            replicate(manifest, run_dir)
        assert_whole(replicate(manifest, run_dir, stores=[store])["path"], sources)


def test_reference_that_leads_to_nothing_or_no_bytes_is_refused(
    sources, run_dir, file_config
) -> None:
    with PayloadStore(file_config) as store:
        reference = store.put(["no", "bytes"])
        manifest = with_file(get_manifest(sources), source=reference.model_dump(mode="json"))
        with pytest.raises(PayloadInvalid, match="not bytes"):
            replicate(manifest, run_dir, stores=[store])
        store.evict(reference)
        with pytest.raises(PayloadMissing):
            replicate(manifest, run_dir, stores=[store])
    assert not published(run_dir)


def test_killed_replication_goes_on_where_it_was(sources, run_dir) -> None:
    kill = """
import json, os, signal, sys
from fabric.payloads import replicate
def progress(done_bytes, total_bytes):
    if done_bytes > 5_000_000:
        os.kill(os.getpid(), signal.SIGKILL)
replicate(json.loads(sys.stdin.read()), sys.argv[1], progress=progress)
"""
    manifest = get_manifest(sources)
    done = subprocess.run(
        [sys.executable, "-c", kill, str(run_dir)],
        input=json.dumps(manifest).encode(),
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert not published(run_dir)
    resumed = replicate(manifest, run_dir)
    assert_whole(resumed["path"], sources)
    assert 0 < resumed["fetched_bytes"] < sum(SIZES.values())


def leave_partial(run_dir: Path, manifest: dict[str, Any], change: Callable[[Path], None]) -> None:
    """Replicate, then make it look as if that had been interrupted."""
    folder = Path(replicate(manifest, run_dir)["path"])
    (folder / ".manifest.json").unlink()
    change(folder / "weights/model-1.safetensors")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("change", "fetched_bytes"),
    [
        (flip, 9_000_000),
        (lambda path: os.truncate(path, 4_000_000), 5_000_000),
        (lambda path: path.write_bytes(path.read_bytes() + b"more"), 9_000_000),
        (lambda path: path.unlink(), 9_000_000),
        (lambda path: None, 0),
    ],
    ids=["flipped", "cut", "too long", "gone", "complete"],
)
def test_what_was_left_is_used_as_far_as_it_is_right(
    sources, run_dir, change, fetched_bytes
) -> None:
    manifest = get_manifest(sources)
    leave_partial(run_dir, manifest, change)
    done = replicate(manifest, run_dir)
    assert_whole(done["path"], sources)
    assert done["fetched_bytes"] == fetched_bytes


def test_published_version_that_lost_a_file_is_mended(sources, run_dir) -> None:
    manifest = get_manifest(sources)
    folder = Path(replicate(manifest, run_dir)["path"])
    (folder / "config.json").unlink()
    done = replicate(manifest, run_dir)
    assert_whole(done["path"], sources)
    assert done["fetched_bytes"] == SIZES["config.json"]


def test_flipped_byte_at_the_source_is_refused(sources, run_dir) -> None:
    manifest = get_manifest(sources)
    flip(sources / "weights/model-1.safetensors")
    fetched = []
    with pytest.raises(DigestMismatch, match=r"tiny/weights/model-1\.safetensors"):
        replicate(manifest, run_dir, progress=lambda done, _: fetched.append(done))
    assert fetched.count(max(fetched)) == 2, "it is fetched once more before it is refused"
    assert not published(run_dir)


def test_source_of_another_size_is_refused_unread(sources, run_dir) -> None:
    manifest = get_manifest(sources)
    with (sources / "weights/model-1.safetensors").open("ab") as file:
        file.write(b"more")
    with pytest.raises(DigestMismatch, match="9000004 bytes"):
        replicate(manifest, run_dir)


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe"])
def test_source_that_is_no_file_is_named(sources, run_dir, tmp_path, kind) -> None:
    path = tmp_path / kind
    if kind == "folder":
        path.mkdir()
    if kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(ReplicationFailed, match=f"{kind} is not a file"):
        replicate(with_file(get_manifest(sources), source=str(path)), run_dir)


@pytest.mark.parametrize(
    "change",
    [
        {"path": "../outside"},
        {"path": "/etc/passwd"},
        {"path": "weights/../../outside"},
        {"path": "a//b"},
        {"path": "./a"},
        {"path": "a\\..\\b"},
        {"path": "nul\0"},
        {"path": ""},
        {"path": ".manifest.json"},
        {"path": "config.json"},
        {"path": "config.json/inside"},
        {"size_bytes": -1},
        {"size_bytes": "many"},
        {"sha256": None},
        {"sha256": "00"},
        {"blake3": "0" * 64},
        {"source": "relative/path"},
        {"source": "https://example.org/weights"},
        {"source": "file:///etc/passwd"},
        {"source": {"store": "s"}},
        {"mode": 0o777},
    ],
    ids=str,
)
def test_manifest_that_leads_astray_is_refused(sources, run_dir, change) -> None:
    with pytest.raises(ManifestInvalid) as refused:
        replicate(with_file(get_manifest(sources), **change), run_dir)
    assert "files" in refused.value.detail["where"]
    assert not run_dir.exists()


@pytest.mark.parametrize(
    "change", [{"digest": "../up"}, {"digest": "md5:0"}, {"files": []}, {"name": ""}], ids=str
)
def test_manifest_without_a_digest_or_files_is_refused(sources, run_dir, change) -> None:
    with pytest.raises(ManifestInvalid):
        replicate(get_manifest(sources, **change), run_dir)


def test_other_files_under_the_same_digest_are_refused(sources, run_dir) -> None:
    manifest = get_manifest(sources)
    replicate(manifest, run_dir)
    with pytest.raises(ManifestInvalid, match="holds other files"):
        replicate(manifest | {"files": manifest["files"][:1]}, run_dir)
    assert_whole(published(run_dir)[0], sources)


def test_disk_that_is_too_small_is_found_out_first(sources, run_dir) -> None:
    huge = 2**60
    with pytest.raises(DiskTooSmall, match="more bytes are needed") as refused:
        replicate(with_file(get_manifest(sources), size_bytes=huge), run_dir)
    assert refused.value.detail["free_bytes"] <= shutil.disk_usage(run_dir).total
    assert not published(run_dir)


def test_run_dir_that_cannot_be_written_is_named(sources, tmp_path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ReplicationFailed, match="Not a directory"):
        replicate(get_manifest(sources), tmp_path / "file")


def test_two_at_once_fetch_once(sources, run_dir) -> None:
    manifest = get_manifest(sources)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: replicate(manifest, run_dir), range(4)))
    assert sorted(one["present"] for one in results) == [False, True, True, True]
    assert_whole(results[0]["path"], sources)


def test_memory_does_not_grow_with_the_file(tmp_path, run_dir) -> None:
    source = tmp_path / "large"
    with source.open("wb") as file:
        file.truncate(100_000_000)
    hasher = hashlib.sha256()
    for _ in range(100):
        hasher.update(bytes(1_000_000))
    large = {"path": "large", "size_bytes": 100_000_000, "sha256": hasher.hexdigest()}
    files = [large | {"source": str(source)}]
    manifest = {"name": "large", "revision": "1", "digest": DIGEST, "files": files}
    tracemalloc.start()
    try:
        replicate(manifest, run_dir)
        assert tracemalloc.get_traced_memory()[1] < 16_000_000
    finally:
        tracemalloc.stop()
