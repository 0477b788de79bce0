"""``python -m fabric.engine.partition.agent``: starts the ranks of one node through torchrun.

The instance runs it on its own node. On each further node of a block, the batch script does::

    python -m fabric.engine.partition.agent --rendezvous HEAD:PORT --num-ranks 8 --first-rank 4 \\
        --local-ranks 4

Free of torch until it is asked to connect.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import TCPStore

CONNECT_S = 600.0
"""The longest that ranks wait for rank 0 and for each other at the start."""

TELL_S = 3.0
"""The longest that an agent tries to tell rank 0 of a loss: rank 0 may be what is lost."""

POLL_S = 0.1
PEER_LOST = 75
"""The exit code of a rank that ends because another one did."""

LOST = "lost"
"""The key under which an agent says which rank ended, and how."""

DEVICE = "device"
"""The key under which rank 0 says where the model is: ``cpu`` or ``cuda``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Station:
    """Where a rank, or a node's first rank, stands.

    Args:
        host: Of rank 0, as this node reaches it.
        port: Of rank 0's store.
        num_ranks: Of all nodes.
        rank: This one's, or the node's first.
        local_ranks: Ranks to be started on this node.
        first_gpu: Which of the node's GPUs its first rank takes; beside rank 0, which has taken the
            first, it is the second.
        local_rank: Which of the ranks that are started on this node it is.
        num_threads: Threads torch uses for one operation; 0 leaves torch's default.
        timeout_s: The longest one exchange may take.
        watches_stdin: Whether ranks end when their standard input closes.
    """

    host: str
    port: int
    num_ranks: int
    rank: int
    local_ranks: int
    num_threads: int
    timeout_s: float
    watches_stdin: bool
    first_gpu: int = 0
    local_rank: int = 0

    @property
    def gpu(self) -> int:
        """The GPU of this rank, if the model is on GPUs."""
        return self.first_gpu + self.local_rank

    @property
    def node_ranks(self) -> int:
        """All ranks of this node, rank 0 included."""
        return self.first_gpu + self.local_ranks

    @property
    def is_local(self) -> bool:
        """Whether all ranks are on one machine."""
        return self.host == "127.0.0.1"

    def connect(self, within_s: float = CONNECT_S) -> TCPStore:
        """Return a connection of its own to rank 0's store.

        Raises:
            torch.distributed.DistNetworkError: Rank 0 has not answered ``within_s`` seconds.
        """
        from torch.distributed import TCPStore

        timeout = timedelta(seconds=within_s)
        return TCPStore(self.host, self.port, is_master=False, timeout=timeout)

    def arguments(self, local_rank: str | None = None) -> list[str]:
        """Return the command line that ``parse_arguments`` reads."""
        given = {
            "--rendezvous": f"{self.host}:{self.port}",
            "--num-ranks": self.num_ranks,
            "--first-rank": self.rank,
            "--local-ranks": self.local_ranks,
            "--first-gpu": self.first_gpu,
            "--num-threads": self.num_threads,
            "--timeout-s": self.timeout_s,
        }
        words = [str(word) for pair in given.items() for word in pair]
        words += ["--watch-stdin"] * self.watches_stdin
        return words + (["--local-rank", local_rank] if local_rank else [])


def parse_arguments(words: Sequence[str]) -> Station:
    """Return the station that a command line describes; of one rank if it has ``--local-rank``."""
    parser = argparse.ArgumentParser(prog="fabric.engine.partition.agent")
    parser.add_argument("--rendezvous", required=True, metavar="HOST:PORT")
    parser.add_argument("--num-ranks", required=True, type=int)
    parser.add_argument("--first-rank", required=True, type=int)
    parser.add_argument("--local-ranks", required=True, type=int)
    parser.add_argument("--local-rank", default=0, type=int)
    parser.add_argument("--first-gpu", default=0, type=int)
    parser.add_argument("--num-threads", default=0, type=int)
    parser.add_argument("--timeout-s", default=60.0, type=float)
    parser.add_argument("--watch-stdin", action="store_true")
    given = parser.parse_args(words)
    host, _, port = given.rendezvous.rpartition(":")
    if not host or not port.isdigit():
        parser.error(f"--rendezvous is HOST:PORT, not {given.rendezvous!r}")
    return Station(
        host=host,
        port=int(port),
        num_ranks=given.num_ranks,
        rank=given.first_rank + given.local_rank,
        local_ranks=given.local_ranks,
        num_threads=given.num_threads,
        timeout_s=given.timeout_s,
        watches_stdin=given.watch_stdin,
        first_gpu=given.first_gpu,
        local_rank=given.local_rank,
    )


def main() -> int:
    """Run the node's ranks; return 0 when all have ended well, or tell rank 0 which has not."""
    station = parse_arguments(sys.argv[1:])
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.utils import macros
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Rank 0 drains when a batch system signals all processes of a job; its ranks must outlive it.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=station.local_ranks,
        run_id=f"ranks-{station.rank}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=POLL_S,
        signals_to_handle="SIGQUIT",
    )
    command = ("-m", "fabric.engine.partition.follower", *station.arguments(macros.local_rank))
    try:
        elastic_launch(config, sys.executable)(*command)
    except ChildFailedError as error:
        ended = {local: failure.exitcode for local, failure in error.failures.items()}
        causes = {local: code for local, code in ended.items() if code != PEER_LOST} or ended
        local, code = min(causes.items())
        lost = {"rank": station.rank + local, "exit_code": code}
        tell_rank_0(station, json.dumps(lost))
        return 1
    return 0


def tell_rank_0(station: Station, lost: str) -> None:
    """Say which rank was lost, as JSON, unless rank 0 is gone itself."""
    from torch.distributed import DistError

    try:
        station.connect(TELL_S).set(LOST, lost)
    except DistError as error:
        print(f"rank 0 is gone, it is not told of {lost}: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
