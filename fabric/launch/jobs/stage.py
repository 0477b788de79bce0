"""Brings a job's weights to where its processes read them, on all of its nodes."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fabric.config import System
from fabric.errors import (
    DiskTooSmall,
    NodeFailed,
    SettingInvalid,
    VersionError,
    WeightsMissing,
)
from fabric.launch.jobs.nodes import NodeProcess
from fabric.launch.jobs.order import Order
from fabric.launch.jobs.records import write_whole
from fabric.launch.jobs.replicas import Replicas
from fabric.launch.jobs.staging import choose_staging, count_reads
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
from fabric.messages import EngineOptions, Launch

POLL_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """How weights come to the nodes of one job.

    Args:
        order: What the job is for.
        options: How its engine is sized.
        system: The machine.
        host: This node.
        ranks: Processes on each node, this one first.
        manifests: Where the digests of weights are kept between jobs.
        run_on: Starts a command on another of the job's nodes.
        say: Told what is decided and done, for the log.
        tell: Told how far it is; raises whatever ends the job.
        find_replicas: Asks who serves the same version and gives its files.
    """

    order: Order
    options: EngineOptions
    system: System
    host: str
    ranks: Sequence[int]
    manifests: Path
    run_on: Callable[[int, Sequence[str]], NodeProcess]
    say: Callable[[str], None]
    tell: Callable[[str], None]
    find_replicas: Callable[[], Replicas | None] = lambda: None

    def bring(self, launch: Launch) -> str:
        """Return where the job's processes read the weights: a source as the engine takes it.

        Raises:
            WeightsMissing: There are none.
            NodeFailed: They could not be copied on another node.
            VersionError: They could not be copied here.
        """
        root = self.system.model_weights
        try:
            weights = find_weights(
                launch.source, model=launch.model, roots=[root] if root else [], host=self.host
            )
        except WeightsMissing:
            try:
                if (copy := self._copy(None)) is not None:
                    return str(copy)
            except VersionError as error:
                self.say(error.message)
            raise
        if weights is None:
            return launch.source
        return str(self._copy(weights) or weights)

    def _find_folder(self) -> Path | None:
        """Return where copies are on this node's disk, if it is known and may be used."""
        local_dir = self.system.storage.local_dir
        if local_dir is None or self.order.staging == "never":
            return None
        try:
            return get_own_dir(local_dir)
        except SettingInvalid as error:
            self.say(error.message)
            return None

    def _copy(self, weights: Path | None) -> Path | None:
        """Copy them to the disks of all nodes, if that pays; return the copy.

        Args:
            weights: Where all nodes see them; ``None``: a replica may have them.
        """
        folder = self._find_folder()
        record = None if weights is None else get_record_path(weights, self.manifests)
        is_there = folder is not None and record is not None and has_copy(record, folder)
        replicas = None if folder is None or is_there else self.find_replicas()
        if weights is not None:
            num_bytes = get_size_bytes(weights)
        elif replicas is not None and replicas.manifest is not None:
            num_bytes = replicas.manifest.size_bytes
        else:
            return None
        choice = choose_staging(
            num_bytes=num_bytes,
            reads=count_reads(self.options, self.ranks),
            storage=self.system.storage,
            free_bytes=None if folder is None else _get_free_bytes(folder),
            is_known=record is not None and record.exists(),
            is_there=is_there,
            is_missing=weights is None,
            replica_gb_s=replicas.gb_s if replicas else None,
            wish=self.order.staging,
        )
        self.say(f"weights: {choice.reason}")
        if folder is None or not choice.pays:
            return None
        replicas = replicas if choice.from_replica else None
        record = self._write_record(record, weights, replicas)
        manifest, others = read_manifest(record), self._copy_elsewhere(record, replicas)
        try:
            copy = copy_weights(manifest, folder, self._telling("copying", replicas), replicas)
        except VersionError as error:
            if others or weights is None or not (replicas or isinstance(error, DiskTooSmall)):
                raise  # all nodes read the same path
            self.say(f"{error.message} They are read from where they are.")
            return None
        for other in others:
            self._await(other)
        self.say(f"weights: in {copy}{replicas.describe() if replicas else ''}")
        is_file = len(manifest.files) == 1 if weights is None else weights.is_file()
        return copy / manifest.files[0].path if is_file else copy

    def _write_record(
        self, record: Path | None, weights: Path | None, replicas: Replicas | None
    ) -> Path:
        """Write the manifest that is copied by, our own or as a replica tells it; return where."""
        told = None if replicas is None else replicas.manifest
        if record is not None and weights is not None and (told is None or record.exists()):
            progress = self._telling("checking")
            write_manifest(record, weights, model=self.order.model, progress=progress)
            return record
        assert told is not None
        if weights is not None:
            folder = weights if weights.is_dir() else weights.parent
            own = [
                file.model_copy(update={"source": str(folder / file.path)}) for file in told.files
            ]
            told = told.model_copy(update={"files": tuple(own)})
        path = self.manifests / f"told-{told.fingerprint}.json"
        path.parent.mkdir(mode=0o700, exist_ok=True)
        write_whole(path, told.model_dump_json())
        return path

    def _copy_elsewhere(self, record: Path, replicas: Replicas | None) -> list[NodeProcess]:
        """Begin the copies of the job's further nodes."""
        if len(self.ranks) == 1:
            return []
        local_dir = str(self.system.storage.local_dir)
        command = [sys.executable, "-m", "fabric.launch.jobs.weights", str(record), local_dir]
        if replicas is not None:
            kept = record.with_name(f"{record.stem}-{self.host}.replicas")
            command.append(str(replicas.write(kept)))
        return [self.run_on(index, command) for index in range(1, len(self.ranks))]

    def _await(self, copying: NodeProcess) -> None:
        while (code := copying.poll()) is None:
            self.tell(f"copying weights on {copying.host}")
            time.sleep(POLL_S)
        if code:
            what = "copying the weights there"
            raise NodeFailed(host=copying.host, what=what, reason=f"ended with code {code}")

    def _telling(self, doing: str, replicas: Replicas | None = None) -> Callable[[int, int], None]:
        def progress(done: int, total: int) -> None:
            giver = replicas.giver if replicas else None
            place = f" from {giver}" if giver else ""
            self.tell(f"{doing} weights{place}: {done / 1e9:.3g} of {total / 1e9:.3g} GB")

        return progress


def _get_free_bytes(folder: Path) -> int:
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize
