"""A job's weights: found on its nodes, and copied to their own disks where that pays.

``python -m fabric.launch.jobs.weights MANIFEST FOLDER [REPLICAS]`` makes the copy of one further
node. Jobs of the same user on a node share one copy: see ``fabric.payloads.replicate``, by which
files are checked by digest, an interrupted copy is continued, and a copy is seen when all of it is
there.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fabric.errors import FabricError, ManifestInvalid, SettingInvalid, WeightsMissing
from fabric.launch.jobs.records import write_whole
from fabric.launch.jobs.replicas import Replicas
from fabric.payloads import Manifest, replicate
from fabric.payloads.manifest import FileSource, get_manifest

_SCHEME = re.compile(r"(gguf|package|[a-z][a-z0-9-]+):(.*)", re.S)
_OTHER_FORMATS = frozenset({".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx"})
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CHUNK_BYTES = 2**22

Progress = Callable[[int, int], None]
"""Told bytes that are done, and all bytes."""


def find_weights(source: str, *, model: str, roots: Sequence[str], host: str) -> Path | None:
    """Return the file or directory of a model's weights; ``None`` if they are no files.

    Args:
        source: Where the hub says they are.
        model: ``name@revision``.
        roots: Directories of the machine that hold models, by name or as a Hugging Face cache.
        host: This node, for the error.

    Raises:
        WeightsMissing: They are in none of these places.
    """
    found = _SCHEME.fullmatch(source)
    scheme, location = (found[1], found[2]) if found else ("", source)
    if scheme == "package":
        if _has_package(location):
            return None
    elif scheme not in ("", "gguf"):
        return None  # no files: another engine knows what it means
    else:
        path = Path(location).expanduser()
        if path.exists():
            return path
        name = model.partition("@")[0]
        for root in map(Path, roots):
            for candidate in _candidates(root, name, path.name):
                if candidate.exists():
                    return candidate
    raise WeightsMissing(model=model, source=source, host=host, looked_in=roots)


def get_size_bytes(weights: Path) -> int:
    """Return how many bytes a model's files have."""
    return sum(path.stat().st_size for _, path in _files(weights))


def get_record_path(weights: Path, kept: Path) -> Path:
    """Return where a manifest of a model's files is kept, as long as they do not change."""
    seen = [
        (name, str(path.resolve()), of.st_size, of.st_mtime_ns)
        for name, path in _files(weights)
        for of in (path.stat(),)
    ]
    return kept / f"{hashlib.sha256(repr(seen).encode()).hexdigest()}.json"


def write_manifest(record: Path, weights: Path, *, model: str, progress: Progress) -> None:
    """Write a manifest of a model's files, unless it is there; their digests are taken once.

    Args:
        record: Where it is kept.
        weights: A file or a directory.
        model: ``name@revision``.
        progress: Called as files are read.
    """
    if record.exists():
        return
    files = [(name, path.resolve()) for name, path in _files(weights)]
    sizes = [path.stat().st_size for _, path in files]
    sources = []
    for place, (name, path) in enumerate(files):
        before, total = sum(sizes[:place]), sum(sizes)
        # Where a Hugging Face cache keeps a large file, its name is its digest.
        is_named = _SHA256.fullmatch(path.name) is not None
        digest = path.name if is_named else _digest(path, progress, before, total)
        sources.append(
            FileSource(path=name, size_bytes=sizes[place], sha256=digest, source=str(path))
        )
    name, _, revision = model.partition("@")
    whole = hashlib.sha256(repr([(one.path, one.sha256) for one in sources]).encode()).hexdigest()
    manifest = Manifest(
        name=name, revision=revision or "1", digest=f"sha256:{whole}", files=tuple(sources)
    )
    record.parent.mkdir(mode=0o700, exist_ok=True)
    write_whole(record, manifest.model_dump_json())


def read_manifest(path: Path) -> Manifest:
    """Return a manifest that was written here.

    Raises:
        ManifestInvalid: It is not one.
    """
    try:
        return get_manifest(json.loads(path.read_bytes()))
    except ValueError as error:
        raise ManifestInvalid(where=str(path), reason=str(error)) from error


def get_own_dir(local_dir: str) -> Path:
    """Return this user's folder on a node's disk; made if missing, and nobody else's.

    Raises:
        SettingInvalid: It cannot be made, or somebody else has made it.
    """
    path = Path(local_dir) / f"fabric-{os.getuid()}"
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        seen = path.lstat()
    except OSError as error:
        raise SettingInvalid(
            setting="system.storage.local_dir",
            value=local_dir,
            reason=f"it cannot be used: {error}",
        ) from error
    if not stat.S_ISDIR(seen.st_mode) or seen.st_uid != os.getuid() or seen.st_mode & 0o022:
        reason = f"{path} is not a folder that only you may write to; remove it"
        raise SettingInvalid(setting="system.storage.local_dir", value=local_dir, reason=reason)
    return path


def copy_weights(
    manifest: Manifest, folder: Path, progress: Progress, replicas: Replicas | None = None
) -> Path:
    """Make the copy of a model on this node, or find it there; return its folder.

    Args:
        manifest: What it consists of.
        folder: Where the copies of this node are.
        progress: Called as bytes arrive.
        replicas: Are asked before the files' own sources are.

    Raises:
        DiskTooSmall: It does not fit.
        DigestMismatch: A file has changed since its digest was taken.
        ReplicationFailed: A file cannot be read or written.
    """
    fields = manifest.model_dump(mode="json")
    done: dict[str, Any] = replicate(fields, folder, progress=progress, nearer=replicas)
    return Path(done["path"])


def has_copy(record: Path, folder: Path) -> bool:
    """Return whether a whole copy of what a manifest says is in a folder."""
    if not record.exists():
        return False
    return (folder / "versions" / read_manifest(record).digest.replace(":", "-")).is_dir()


def _has_package(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _candidates(root: Path, name: str, basename: str) -> Iterator[Path]:
    yield root / name
    yield root / basename
    # models--ORGANIZATION--NAME/snapshots/REVISION, the newest last
    for snapshots in sorted(root.glob(f"models--*--{name}/snapshots")):
        yield from sorted(snapshots.iterdir(), key=lambda one: -one.stat().st_mtime)


def _files(weights: Path) -> list[tuple[str, Path]]:
    """Return what is loaded of a model: not the same weights in other formats, nothing hidden."""
    if weights.is_file():
        return [(weights.name, weights)]
    paths = [path for path in sorted(weights.rglob("*")) if path.is_file()]
    named = [(path.relative_to(weights), path) for path in paths]
    shown = [(name, path) for name, path in named if not any(p[0] == "." for p in name.parts)]
    has_safetensors = any(name.suffix == ".safetensors" for name, _ in shown)
    return [
        (name.as_posix(), path)
        for name, path in shown
        if not (has_safetensors and name.suffix in _OTHER_FORMATS)
    ]


def _digest(path: Path, progress: Progress, before: int, total: int) -> str:
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            hasher.update(chunk)
            progress(before + file.tell(), total)
    return hasher.hexdigest()


def main(argv: Sequence[str]) -> int:
    """Make the copy of one node; return the exit code."""
    manifest_path, local_dir, *more = argv
    try:
        manifest = read_manifest(Path(manifest_path))
        replicas = Replicas.read(Path(more[0]), print) if more else None
        copy_weights(manifest, get_own_dir(local_dir), lambda _done, _total: None, replicas)
    except FabricError as error:
        print(error.message, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
