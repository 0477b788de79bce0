"""What ranks say to each other: sums within a tensor group, hidden states between stages, logits.

Shapes: N tokens of the step, W tokens whose logits are wanted, V vocabulary, H hidden size.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from fabric.engine.partition.layout import Layout, Place, share

BACKENDS = "cpu:gloo,cuda:nccl"

_PATIENCE = timedelta(days=365)
"""Of a rank that waits for orders: that rank 0 is gone is seen by its closed connections."""


@contextlib.contextmanager
def _loopback() -> Iterator[None]:
    # gloo has no other way to be told an address.
    before = os.environ.get("GLOO_SOCKET_IFNAME")
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        yield
    finally:
        if before is None:
            del os.environ["GLOO_SOCKET_IFNAME"]
        else:
            os.environ["GLOO_SOCKET_IFNAME"] = before


class World:
    """All ranks, as one of them sees them.

    Args:
        store: Where they find each other.
        rank: Which this process is.
        num_ranks: How many there are.
        timeout_s: The longest one exchange may take.
        local: Whether all are on this machine; then they listen on loopback alone.
    """

    SMALL = 1024
    """Numbers of an order that go out in one piece: a step of decoding rows fits."""

    def __init__(
        self, store: dist.Store, *, rank: int, num_ranks: int, timeout_s: float, local: bool
    ) -> None:
        self._store = store
        self._rank = rank
        self._num_ranks = num_ranks
        self._timeout = timedelta(seconds=timeout_s)
        self._on_address = _loopback if local else contextlib.nullcontext
        self._orders: dist.ProcessGroup | None = None
        self._groups: dict[range, dist.ProcessGroup] = {}

    def join(self) -> None:
        """Make this process one of the ranks; returns when all have done so."""
        with self._on_address():
            dist.init_process_group(
                BACKENDS if torch.cuda.is_available() else "gloo",
                store=self._store,
                rank=self._rank,
                world_size=self._num_ranks,
                timeout=self._timeout,
            )
            self._orders = dist.new_group(backend="gloo", timeout=_PATIENCE)

    def group(self, layout: Layout) -> None:
        """Make the groups of a layout; all ranks call this, also those that are in none of them.

        A group serves until the end: torch cannot make the same one a second time.
        """
        everyone = range(layout.num_ranks)
        for ranks in (everyone, *(layout.place(rank).group for rank in everyone)):
            if len(ranks) > 1 and ranks not in self._groups:
                with self._on_address():
                    self._groups[ranks] = dist.new_group(list(ranks), timeout=self._timeout)

    def of(self, ranks: range) -> dist.ProcessGroup:
        """Return a group of some ranks that has been made."""
        return self._groups[ranks]

    def leave(self) -> None:
        """Be no rank any more. Calling it twice is harmless."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def send_order(self, numbers: list[int]) -> None:
        """Tell all ranks; called by rank 0."""
        head = torch.zeros(self.SMALL, dtype=torch.int64)
        body = torch.tensor(numbers, dtype=torch.int64)
        head[0] = len(numbers)
        first = min(len(numbers), self.SMALL - 1)
        head[1 : 1 + first] = body[:first]
        dist.broadcast(head, src=0, group=self._orders)
        if len(numbers) > first:
            dist.broadcast(body[first:], src=0, group=self._orders)

    def receive_order(self) -> list[int]:
        """Wait for rank 0 to say something."""
        head = torch.empty(self.SMALL, dtype=torch.int64)
        dist.broadcast(head, src=0, group=self._orders)
        length = int(head[0])
        first = min(length, self.SMALL - 1)
        numbers: list[int] = head[1 : 1 + first].tolist()
        if length > first:
            rest = torch.empty(length - first, dtype=torch.int64)
            dist.broadcast(rest, src=0, group=self._orders)
            numbers += rest.tolist()
        return numbers


class Groups:
    """The exchanges of one rank while a model is open.

    Args:
        place: Of this rank.
        world: All ranks, grouped by the layout; ``None`` if this is the only one.
    """

    def __init__(self, place: Place, world: World | None) -> None:
        self.place = place
        self.tensor: dist.ProcessGroup | None = None
        self._all: dist.ProcessGroup | None = None
        if world is not None:
            self._all = world.of(range(place.layout.num_ranks))
            if place.layout.tensor > 1:
                self.tensor = world.of(place.group)

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of the tensor group's ``x``, in place."""
        if self.tensor is not None:
            x = x.contiguous()
            dist.all_reduce(x, group=self.tensor)
        return x

    def pass_on(self, hidden_1NH: Tensor) -> None:
        """Send hidden states to the next stage."""
        target = self.place.rank + self.place.layout.tensor
        dist.send(hidden_1NH.contiguous(), target, group=self._all)

    def take_over(self, like_1NH: Tensor) -> Tensor:
        """Return the hidden states of the stage before."""
        received = torch.empty_like(like_1NH, memory_format=torch.contiguous_format)
        dist.recv(received, self.place.rank - self.place.layout.tensor, group=self._all)
        return received

    def collect(self, logits_WV: Tensor, *, vocabulary: int, divided: bool) -> Tensor:
        """Bring the last stage's logits to rank 0.

        Args:
            logits_WV: Of this rank; only those of the last stage mean anything.
            vocabulary: Logits of a token in all.
            divided: Whether each rank of the last stage has part of them, or else all.

        Returns:
            At rank 0 logits [W, ``vocabulary``] in float32; elsewhere what was given.
        """
        layout, rank = self.place.layout, self.place.rank
        num_parts = layout.tensor if divided else 1
        first = layout.num_ranks - layout.tensor
        num_wanted = logits_WV.shape[0]
        if rank:
            if num_wanted and rank in range(first, first + num_parts):
                dist.send(logits_WV.float().contiguous(), 0, group=self._all)
            return logits_WV
        parts = []
        for index in range(num_parts):
            if first + index == 0:
                parts.append(logits_WV.float())
                continue
            size = len(share(vocabulary, num_parts, index))
            part = logits_WV.new_empty(num_wanted, size, dtype=torch.float32)
            if num_wanted:
                dist.recv(part, first + index, group=self._all)
            parts.append(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def fetch_hidden(self, hidden_NH: Tensor) -> Tensor:
        """Bring the last stage's hidden states [N, H], in float32, to rank 0."""
        source = self.place.layout.num_ranks - self.place.layout.tensor
        if source == 0:
            return hidden_NH.float()
        if self.place.rank == source:
            dist.send(hidden_NH.float().contiguous(), 0, group=self._all)
        elif self.place.rank == 0:
            hidden_NH = torch.empty_like(hidden_NH, dtype=torch.float32)
            dist.recv(hidden_NH, source, group=self._all)
        return hidden_NH

    def least(self, value: int) -> int:
        """Return the least of all ranks' values."""
        if self._all is None:
            return value
        number = torch.tensor(value)
        dist.all_reduce(number, dist.ReduceOp.MIN, group=self._all)
        return int(number)

    def share_problem(self, problem: str) -> str:
        """Tell all ranks what went wrong here, if anything; return the first rank's problem."""
        if self._all is None:
            return problem
        problems: list[str] = [""] * self.place.layout.num_ranks
        dist.all_gather_object(problems, problem, group=self._all)
        return next(filter(None, problems), "")
