"""Weights of a job: found, told from each other, and copied once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fabric.errors import (
    DigestMismatch,
    ManifestInvalid,
    ReplicationFailed,
    SettingInvalid,
    WeightsMissing,
)
from fabric.launch.jobs.weights import (
    copy_weights,
    find_weights,
    get_own_dir,
    get_record_path,
    get_size_bytes,
    has_copy,
    read_manifest,
    write_manifest,
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "shared" / "m"
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "1_Pooling" / "config.json").write_text("[]")
    (folder / "model.safetensors").write_bytes(os.urandom(300_000))
    (folder / "pytorch_model.bin").write_bytes(b"the same in another format")
    (folder / ".lock").write_text("")
    return folder


def find(source: str, *roots: Path) -> Path | None:
    return find_weights(source, model="m@1", roots=[str(root) for root in roots], host="n1")


def manifest_of(weights: Path, kept: Path) -> Path:
    record = get_record_path(weights, kept)
    write_manifest(record, weights, model="m@1", progress=lambda _done, _total: None)
    return record


def test_weights_are_where_the_hub_says_or_where_the_machine_keeps_models(
    tmp_path: Path, model: Path
) -> None:
    assert find(str(model)) == model
    assert find("/elsewhere/x", model.parent) == model
    assert find("/elsewhere/m", model.parent) == model
    gguf = tmp_path / "m.gguf"
    gguf.write_bytes(b"GGUF")
    assert find(f"gguf:{gguf}") == gguf


def test_a_hugging_face_cache_is_looked_through(tmp_path: Path) -> None:
    cache = tmp_path / "hub"
    for age, revision in enumerate(("new", "old")):
        snapshot = cache / "models--a-lab--m" / "snapshots" / revision
        snapshot.mkdir(parents=True)
        os.utime(snapshot, (1e9 - age, 1e9 - age))
    assert find("/elsewhere", cache) == cache / "models--a-lab--m/snapshots/new"


def test_what_is_no_file_is_left_alone() -> None:
    assert find("package:json") is None
    assert find("fixed-delay:token_s=0.1") is None


@pytest.mark.parametrize("source", ["/no/such/m", "gguf:/no/m.gguf", "package:no_such_package"])
def test_missing_weights_name_the_node_and_the_places(source: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsMissing) as caught:
        find(source, tmp_path)
    assert f"not at {source!r} on the node n1, nor is the model in {tmp_path}" in str(caught.value)
    assert caught.value.code == "weights_missing"


def test_one_format_is_counted_and_copied(model: Path, tmp_path: Path) -> None:
    assert get_size_bytes(model) == 300_004
    record = manifest_of(model, tmp_path / "kept")
    assert {file.path for file in read_manifest(record).files} == {
        "1_Pooling/config.json",
        "config.json",
        "model.safetensors",
    }
    folder = get_own_dir(str(tmp_path))
    assert not has_copy(record, folder)
    copy = copy_weights(read_manifest(record), folder, lambda _done, _total: None)
    assert has_copy(record, folder)
    weights = (copy / "model.safetensors").read_bytes()
    assert weights == (model / "model.safetensors").read_bytes()


def test_digests_are_taken_once_and_again_when_a_file_changes(model: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    record = manifest_of(model, kept)
    before = record.stat().st_mtime_ns
    assert manifest_of(model, kept) == record
    assert record.stat().st_mtime_ns == before
    (model / "model.safetensors").write_bytes(b"others")
    other = manifest_of(model, kept)
    assert other != record
    assert read_manifest(other).digest != read_manifest(record).digest


def test_the_name_of_a_blob_is_its_digest(tmp_path: Path) -> None:
    """As a Hugging Face cache has it: what is copied is still held against it."""
    blob = tmp_path / ("ab" * 32)
    blob.write_bytes(b"not what its name says")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "model.safetensors").symlink_to(blob)
    record = manifest_of(snapshot, tmp_path / "kept")
    assert read_manifest(record).files[0].sha256 == "ab" * 32
    with pytest.raises(DigestMismatch):
        copy_weights(read_manifest(record), get_own_dir(str(tmp_path)), lambda *_: None)


def test_weights_that_go_while_they_are_copied_are_an_error(model: Path, tmp_path: Path) -> None:
    record = manifest_of(model, tmp_path / "kept")
    (model / "model.safetensors").unlink()
    with pytest.raises(ReplicationFailed, match="is not a file"):
        copy_weights(read_manifest(record), get_own_dir(str(tmp_path)), lambda *_: None)


def test_two_jobs_at_once_share_one_copy(model: Path, tmp_path: Path) -> None:
    record = manifest_of(model, tmp_path / "kept")
    command = [sys.executable, "-m", "fabric.launch.jobs.weights", str(record), str(tmp_path)]
    with ThreadPoolExecutor(2) as pool:
        runs = [
            pool.submit(subprocess.run, command, capture_output=True, timeout=60, check=False)
            for _ in range(2)
        ]
    assert [run.result().returncode for run in runs] == [0, 0]
    (copy,) = (
        path for path in (get_own_dir(str(tmp_path)) / "versions").iterdir() if path.is_dir()
    )
    assert (copy / "config.json").read_text() == "{}"


def test_a_copy_on_another_node_says_what_went_wrong(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fabric.launch.jobs.weights"]
    bad = tmp_path / "manifest.json"
    bad.write_text(json.dumps({"name": "m"}))
    done = subprocess.run(
        [*command, str(bad), str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "manifest of files is refused" in done.stderr
    bad.write_text("{")
    with pytest.raises(ManifestInvalid):
        read_manifest(bad)


def test_a_folder_that_others_may_write_to_is_not_used(tmp_path: Path) -> None:
    own = tmp_path / f"fabric-{os.getuid()}"
    own.mkdir()
    own.chmod(0o777)
    with pytest.raises(SettingInvalid, match="only you may write to"):
        get_own_dir(str(tmp_path))
    own.rmdir()
    own.symlink_to("/tmp")
    with pytest.raises(SettingInvalid, match="only you may write to"):
        get_own_dir(str(tmp_path))
    with pytest.raises(SettingInvalid, match="cannot be used"):
        get_own_dir(str(tmp_path / "none"))
