"""What ranks say to each other: sums within a tensor group, hidden states between stages, logits.

What is on GPUs goes by NCCL, everything else by gloo.

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
from torch._C._distributed_c10d import ErrorType

from fabric.engine.device import CPU
from fabric.engine.partition.layout import Layout, Place, share

_PATIENCE = timedelta(days=365)
"""Of a rank that waits for orders, or for others to load: that one is gone is seen by its closed
connections, that one hangs by its silence."""

_COMPILING = 10
"""How many times longer an exchange between GPUs may take: kernels are compiled when a step needs
them first, in one stage after the other."""


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
        device: Where this rank's part of a model is; its kind is the same for all.
    """

    SMALL = 1024
    """Numbers of an order that go out in one piece: a step of decoding rows fits."""

    def __init__(
        self,
        store: dist.Store,
        *,
        rank: int,
        num_ranks: int,
        timeout_s: float,
        local: bool,
        device: torch.device = CPU,
    ) -> None:
        self.device = device
        self._store = store
        self._rank = rank
        self._num_ranks = num_ranks
        self._timeout = timedelta(seconds=timeout_s)
        self._local = local
        self._on_address = _loopback if local else contextlib.nullcontext
        self._orders: dist.ProcessGroup | None = None
        self._meetings: dict[range, dist.ProcessGroup] = {}
        self._groups: dict[range, dist.ProcessGroup] = {}

    def join(self) -> None:
        """Make this process one of the ranks; returns when all have done so."""
        if self.device.type == "cuda":
            self._prepare_nccl()
        with self._on_address():
            dist.init_process_group(
                "gloo",
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
        by_nccl = self.device.type == "cuda"
        backend = "nccl" if by_nccl else "gloo"
        timeout = _COMPILING * self._timeout if by_nccl else self._timeout
        with self._on_address():
            if everyone not in self._meetings:
                self._meetings[everyone] = dist.new_group(
                    list(everyone), backend="gloo", timeout=_PATIENCE
                )
            for ranks in (everyone, *(layout.place(rank).group for rank in everyone)):
                if len(ranks) > 1 and ranks not in self._groups:
                    self._groups[ranks] = dist.new_group(
                        list(ranks), backend=backend, timeout=timeout
                    )

    def of(self, ranks: range) -> dist.ProcessGroup:
        """Return the group by which some ranks exchange what they compute."""
        return self._groups[ranks]

    def meeting_of(self, ranks: range) -> dist.ProcessGroup:
        """Return the group by which all ranks of a layout agree, however long it takes."""
        return self._meetings[ranks]

    def settle(self) -> None:
        """Wait until what was begun on this rank's GPU is done; on a CPU it is.

        Raises:
            torch.distributed.DistBackendError: An exchange failed, so its result means nothing.
        """
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
            if problem := self.find_problem():
                raise dist.DistBackendError(problem)

    def find_problem(self) -> str:
        """Return what torch found wrong with exchanges between GPUs; nothing if they are well."""
        if self.device.type != "cuda":
            return ""
        own = [one for one in list(self._groups.values()) if isinstance(one, dist.ProcessGroup)]
        errors = {one._get_backend(self.device).get_error() for one in own} - {ErrorType.SUCCESS}
        if ErrorType.TIMEOUT in errors:
            limit_s = (_COMPILING * self._timeout).total_seconds()
            return f"an exchange between GPUs has taken over {limit_s:.0f} s"
        return "NCCL says that an exchange between GPUs failed" if errors else ""

    def abort(self) -> None:
        """Wake what waits in an exchange between GPUs; there is none after it."""
        if self.device.type == "cuda":
            dist.distributed_c10d._abort_process_group()

    def leave(self, *, lost: bool = False) -> None:
        """Be no rank any more, also if one is lost. Calling it twice is harmless."""
        # NCCL leaves when all exchanges have ended: after a loss that is never.
        if dist.is_initialized() and not (lost and self.device.type == "cuda"):
            dist.destroy_process_group()

    def _prepare_nccl(self) -> None:
        """Take the rank's GPU, and say what torch does when an exchange fails.

        NCCL's kernels wait on the GPU, and of a rank that died on the same node they never hear:
        only an abort of their communicators ends them. On rank 0 torch's watchdog takes note and
        does no more (0): the crew aborts once it says who is lost, so that no result of an aborted
        step is taken for an answer. On the others it ends the process (3), without an abort, which
        may hang itself.

        Source: torch's page on ProcessGroupNCCL's environment variables.
        """
        torch.cuda.set_device(self.device)
        os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "3" if self._rank else "0"
        if self._local:
            os.environ.setdefault("NCCL_SOCKET_IFNAME", "=lo")

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
        self._meeting: dist.ProcessGroup | None = None
        if world is not None:
            everyone = range(place.layout.num_ranks)
            self._all = world.of(everyone)
            self._meeting = world.meeting_of(everyone)
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
        if self._meeting is None:
            return value
        number = torch.tensor(value)
        dist.all_reduce(number, dist.ReduceOp.MIN, group=self._meeting)
        return int(number)

    def share_problem(self, problem: str) -> str:
        """Tell all ranks what went wrong here, if anything; return the first rank's problem."""
        if self._meeting is None:
            return problem
        problems: list[str] = [""] * self.place.layout.num_ranks
        dist.all_gather_object(problems, problem, group=self._meeting)
        return next(filter(None, problems), "")
