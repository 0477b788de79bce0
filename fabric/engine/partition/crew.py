"""The other ranks, as rank 0 sees them: started, given orders, watched, ended."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from logging import getLogger

import psutil
import torch
import torch.distributed as dist

from fabric.engine.device import CPU
from fabric.engine.partition.agent import CONNECT_S, DEVICE, LOST, PEER_LOST, Station
from fabric.engine.partition.groups import World
from fabric.engine.partition.orders import Order
from fabric.errors import FabricError, RankLost, SettingInvalid

_logger = getLogger(__name__)

_LOOK_S = 0.2
"""How often it is looked whether all ranks live."""

_EXPLAIN_S = 5.0
"""How long a failed exchange waits for what explains it: the agent sees a death a little later."""

_END_S = 20.0
"""How long ranks may take to end when they are told."""


class Crew:
    """The ranks of a divided model but the first, which is this process.

    Args:
        num_ranks: Of all nodes, this process included.
        local_ranks: Of this node, this process included; ``None``: all.
        rendezvous: ``HOST:PORT`` by which other nodes reach this one; ``None``: loopback.
        rendezvous_fd: A socket that is bound there, so that nobody else has taken the port
            meanwhile; ``None`` binds one.
        num_threads: Threads torch uses in each rank for one operation; 0 leaves torch's default.
        timeout_s: How long a rank may be silent, or one exchange take.
        device: Where this process's part is; the others' parts are on devices of the same kind.
        on_lost: Told, on a thread of the crew's, that a rank is lost.
    """

    def __init__(
        self,
        *,
        num_ranks: int,
        local_ranks: int | None = None,
        rendezvous: str | None = None,
        rendezvous_fd: int | None = None,
        num_threads: int = 0,
        timeout_s: float = 60.0,
        device: torch.device = CPU,
        on_lost: Callable[[RankLost], None] | None = None,
    ) -> None:
        self._device = device
        host, _, port = (rendezvous or "127.0.0.1:0").rpartition(":")
        self._station = Station(
            host=host,
            port=int(port),
            num_ranks=num_ranks,
            rank=1,
            local_ranks=(local_ranks or num_ranks) - 1,
            num_threads=num_threads,
            timeout_s=timeout_s,
            watches_stdin=True,
            first_gpu=1,
        )
        self._rendezvous_fd = rendezvous_fd
        self.on_lost = on_lost
        self._lost: RankLost | None = None
        self._found = threading.Event()
        self._ending = threading.Event()
        self._agent: subprocess.Popen[bytes] | None = None
        self._world: World | None = None

    @property
    def num_ranks(self) -> int:
        """Processes in all, this one included."""
        return self._station.num_ranks

    @property
    def world(self) -> World:
        """All ranks. Known after ``start``."""
        assert self._world is not None, "the crew has not been started"
        return self._world

    def start(self) -> None:
        """Start the ranks of this node, and wait for those of all nodes.

        Raises:
            SettingInvalid: This process is a rank already, or a node has too few GPUs.
            RankLost: One of them ended, or did not come in ten minutes.
        """
        if dist.is_initialized():
            raise SettingInvalid(
                setting="engine.tensor_parallel",
                value=self.num_ranks,
                reason="this process is rank 0 of another model; a process holds one divided model",
            )
        self._store = self._open_store()
        if self._station.local_ranks:
            self._agent = subprocess.Popen(
                [sys.executable, "-m", "fabric.engine.partition.agent", *self._station.arguments()],
                stdin=subprocess.PIPE,
                start_new_session=True,
            )
        threading.Thread(target=self._watch, name="ranks", daemon=True).start()
        try:
            self._wait_for_all()
            world = World(
                self._store,
                rank=0,
                num_ranks=self.num_ranks,
                timeout_s=self._station.timeout_s,
                local=self._station.is_local,
                device=self._device,
            )
            world.join()
            self._world = world
        except BaseException:
            self.close()
            raise

    def tell(self, order: Order, numbers: Sequence[int] = ()) -> None:
        """Give an order to all.

        Raises:
            RankLost: One of them is gone.
        """
        with self.together():
            self.world.send_order([order, *numbers])

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Run a block in which ranks exchange tensors.

        Raises:
            RankLost: For whatever else the block raised: the ranks are out of step now.
        """
        if self._lost is not None:
            raise self._lost
        try:
            yield
            self.world.settle()
            if self._lost is not None:
                raise self._lost
        except FabricError:
            raise
        except Exception as error:
            if not self._found.wait(_EXPLAIN_S):
                self._lose(None, f"a step failed ({type(error).__name__}: {error})")
            assert self._lost is not None, "it was found"
            raise self._lost from error

    def close(self) -> None:
        """End the other ranks. Calling it twice is harmless."""
        if self._ending.is_set():
            return
        self._ending.set()
        if self._world is not None and self._lost is None:
            with contextlib.suppress(RankLost):
                self.tell(Order.END)
        if self._agent is not None:
            assert self._agent.stdin is not None
            if self._world is None or self._lost is not None:
                self._kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._agent.wait(_END_S)
            self._kill()
            self._agent.wait()
        if self._world is not None:
            self._world.leave(lost=self._lost is not None)

    def _open_store(self) -> dist.TCPStore:
        # Without a socket of ours the store would listen on all addresses.
        host = self._station.host
        if self._rendezvous_fd is None:
            listener = socket.create_server((host, self._station.port))
        else:
            listener = socket.socket(fileno=self._rendezvous_fd)
        port = listener.getsockname()[1]
        store = dist.TCPStore(
            host,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=CONNECT_S),
            master_listen_fd=listener.detach(),
        )
        store.set(DEVICE, self._device.type)
        self._station = dataclasses.replace(self._station, port=port)
        return store

    def _wait_for_all(self) -> None:
        deadline = time.monotonic() + CONNECT_S
        for rank in range(1, self.num_ranks):
            while not self._store.check([f"here/{rank}"]):
                if self._found.wait(_LOOK_S):
                    assert self._lost is not None, "it was found"
                    raise self._lost
                if time.monotonic() > deadline:
                    self._lose(rank, f"it did not come in {CONNECT_S:g} s")
            if reason := self._store.get(f"here/{rank}").decode():
                raise SettingInvalid(
                    setting="engine.device", value=self._device.type, reason=reason
                )

    def _watch(self) -> None:
        """Look whether the ranks live, until one does not or the crew ends."""
        store = self._station.connect()  # a connection serves one thread at a time
        heard = dict.fromkeys(range(1, self.num_ranks), (0, time.monotonic()))
        failed_at = math.inf
        while not (self._ending.wait(_LOOK_S) or self._found.is_set()):
            if store.check([LOST]):
                lost = json.loads(store.get(LOST))
                self._lose(lost["rank"], _ending_of(lost["exit_code"]))
            elif self._agent is not None and self._agent.poll() is not None:
                self._lose(None, f"torchrun ended with code {self._agent.returncode}")
            now = time.monotonic()
            for rank, (count, at) in heard.items():
                beats = store.add(f"beat/{rank}", 0)
                if beats != count:
                    heard[rank] = (beats, now)
                elif count and now - at > self._station.timeout_s:
                    self._lose(rank, f"it has been silent for {now - at:.0f} s")
            if self._world is not None and (problem := self._world.find_problem()):
                failed_at = min(failed_at, now)
                if now > failed_at + _EXPLAIN_S:
                    self._lose(None, problem)

    def _lose(self, rank: int | None, reason: str) -> None:
        if self._found.is_set() or self._ending.is_set():
            return
        self._lost = RankLost(rank=rank, num_ranks=self.num_ranks, reason=reason)
        self._found.set()
        _logger.error("a rank is lost", extra={"rank": rank, "reason": reason})
        # What still waits for the lost rank, here and elsewhere, wakes by its broken connections.
        self._kill()
        if self.on_lost is not None:
            self.on_lost(self._lost)
        if self._world is not None:
            # Last, and by itself: NCCL may hang in it.
            threading.Thread(target=self._world.abort, name="abort", daemon=True).start()

    def _kill(self) -> None:
        """End the processes of this node at once."""
        if self._agent is None:
            return
        assert self._agent.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._agent.stdin.close()
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self._agent.pid).children(recursive=True):
                process.kill()


def _ending_of(exit_code: int) -> str:
    if exit_code == PEER_LOST:
        return "its connection to another rank broke"
    if exit_code < 0:
        return f"it was ended by {signal.Signals(-exit_code).name}"
    return f"it ended with code {exit_code}"
