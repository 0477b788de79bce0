"""Brings a job's weights to where its processes read them, on all of its nodes."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fabric.config import System
from fabric.errors import DiskTooSmall, NodeFailed, SettingInvalid
from fabric.launch.jobs.nodes import NodeProcess
from fabric.launch.jobs.order import Order
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

    def bring(self, launch: Launch) -> str:
        """Return where the job's processes read the weights: a source as the engine takes it.

        Raises:
            WeightsMissing: There are none.
            NodeFailed: They could not be copied on another node.
            VersionError: They could not be copied here.
        """
        root = self.system.model_weights
        weights = find_weights(
            launch.source, model=launch.model, roots=[root] if root else [], host=self.host
        )
        if weights is None:
            return launch.source
        return str(self._copy(weights) or weights)

    def _copy(self, weights: Path) -> Path | None:
        """Copy them to the disks of all nodes, if that pays; return the copy."""
        folder, free_bytes = None, None
        local_dir = self.system.storage.local_dir
        if local_dir is not None and self.order.staging != "never":
            try:
                folder = get_own_dir(local_dir)
            except SettingInvalid as error:
                self.say(error.message)
                return None
            disk = os.statvfs(folder)
            free_bytes = disk.f_bavail * disk.f_frsize
        record = get_record_path(weights, self.manifests)
        choice = choose_staging(
            num_bytes=get_size_bytes(weights),
            reads=count_reads(self.options, self.ranks),
            storage=self.system.storage,
            free_bytes=free_bytes,
            is_known=record.exists(),
            is_there=folder is not None and has_copy(record, folder),
            wish=self.order.staging,
        )
        self.say(f"weights: {choice.reason}")
        if folder is None or local_dir is None or not choice.pays:
            return None
        write_manifest(record, weights, model=self.order.model, progress=self._telling("checking"))
        command = (sys.executable, "-m", "fabric.launch.jobs.weights", str(record), local_dir)
        others = [self.run_on(index, command) for index in range(1, len(self.ranks))]
        try:
            copy = copy_weights(read_manifest(record), folder, self._telling("copying"))
        except DiskTooSmall as error:
            if others:
                raise  # all nodes read the same path
            self.say(f"{error.message} They are read from where they are.")
            return None
        for other in others:
            self._await(other)
        self.say(f"weights: in {copy}")
        return copy / weights.name if weights.is_file() else copy

    def _await(self, copying: NodeProcess) -> None:
        while (code := copying.poll()) is None:
            self.tell(f"copying weights on {copying.host}")
            time.sleep(POLL_S)
        if code:
            what = "copying the weights there"
            raise NodeFailed(host=copying.host, what=what, reason=f"ended with code {code}")

    def _telling(self, doing: str) -> Callable[[int, int], None]:
        def progress(done: int, total: int) -> None:
            self.tell(f"{doing} weights: {done / 1e9:.3g} of {total / 1e9:.3g} GB")

        return progress
