"""``python -m fabric.engine.partition.follower``: a rank that does what rank 0 tells it.

torchrun starts it (see ``agent``). It ends with rank 0: by order, or when a connection to another
rank breaks, or when its standard input, which rank 0 holds, closes.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

import torch
import torch.distributed as dist

from fabric.engine.device import CPU, choose_gpu
from fabric.engine.partition.agent import DEVICE, PEER_LOST, Station, parse_arguments
from fabric.engine.partition.groups import World
from fabric.engine.partition.opening import Opening, OpenPart, open_part
from fabric.engine.partition.orders import Order, read_chunks, read_text
from fabric.errors import FabricError, SettingInvalid

BEAT_S = 1.0
"""How often a rank shows that it lives."""


def main() -> None:
    """Join the ranks and follow orders until told to end."""
    station = parse_arguments(sys.argv[1:])
    # Blocked before any thread starts, so that only the watcher sees it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_when_told, daemon=True).start()
    if station.watches_stdin:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    if station.num_threads:
        torch.set_num_threads(station.num_threads)
    ending = threading.Event()
    store = station.connect()
    try:
        device = _find_device(store, station)
        store.set(f"here/{station.rank}", "")
        threading.Thread(target=_beat, args=(station, ending), daemon=True).start()
        world = World(
            store,
            rank=station.rank,
            num_ranks=station.num_ranks,
            timeout_s=station.timeout_s,
            local=station.is_local,
            device=device,
        )
        world.join()
        follow(station.rank, world)
    except (RuntimeError, ConnectionError) as error:
        if not _is_exchange(error):
            raise
        print(f"rank {station.rank} ends, another is gone: {error}", file=sys.stderr, flush=True)
        os._exit(PEER_LOST)
    ending.set()
    world.leave()


def follow(rank: int, world: World) -> None:
    """Do what rank 0 says, until it says that this is the end."""
    part: OpenPart | None = None
    while True:
        order, *numbers = world.receive_order()
        match Order(order):
            case Order.OPEN:
                part = _open(read_text(numbers), rank, world)
            case Order.CLOSE | Order.END:
                if part is not None:
                    part.close()
                part = None
                if order == Order.END:
                    return
            case _ if part is not None:
                _run(part, Order(order), numbers)


def _open(text: str, rank: int, world: World) -> OpenPart | None:
    opening = Opening.from_json(text)
    world.group(opening.layout)
    if rank >= opening.layout.num_ranks:
        return None
    try:
        return open_part(opening, rank, world)
    except FabricError as error:  # rank 0 has the same, or a better one
        print(f"rank {rank}: {error.message}", file=sys.stderr, flush=True)
        return None


def _run(part: OpenPart, order: Order, numbers: list[int]) -> None:
    match order:
        case Order.STEP:
            part.runner.forward(read_chunks(numbers))
        case Order.STEP_HIDDEN:
            part.runner.forward_hidden(read_chunks(numbers))
        case Order.COPY:
            source, target = numbers
            part.runner.cache.copy_block(source, target)
        case Order.WIPE:
            part.runner.cache.wipe(numbers)


def _find_device(store: dist.Store, station: Station) -> torch.device:
    """Return where this rank's part goes; if there is no place for it, tell rank 0 and wait."""
    if store.get(DEVICE).decode() == "cpu":
        return CPU
    try:
        return choose_gpu(station.gpu, station.node_ranks)
    except SettingInvalid as error:
        store.set(f"here/{station.rank}", str(error.detail["reason"]))
        # Rank 0 gives up, and its store with it; the reason says more than an exit code.
        store.wait(["never"])
        raise


def _is_exchange(error: Exception) -> bool:
    """Say whether an error is of an exchange with other ranks, and not of a computation."""
    said = str(error).lower()
    return isinstance(error, dist.DistError | ConnectionError) or "gloo" in said or "nccl" in said


def _end_with_stdin() -> None:
    while os.read(0, 1):
        pass
    os._exit(0)


def _end_when_told() -> None:
    """End by the agent's signal; a batch system's goes to all, and rank 0 alone drains."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(128 + signal.SIGTERM)


def _beat(station: Station, ending: threading.Event) -> None:
    store = station.connect()  # a connection serves one thread at a time
    ended = False
    while not ended:
        try:
            store.add(f"beat/{station.rank}", 1)
        except dist.DistError as error:
            # A rank that waits for its GPU does not see its other connections break.
            if not ending.wait(BEAT_S):
                print(f"rank {station.rank} ends, rank 0 is gone: {error}", file=sys.stderr)
                sys.stderr.flush()
                os._exit(PEER_LOST)
        ended = ending.wait(BEAT_S)


if __name__ == "__main__":
    main()
