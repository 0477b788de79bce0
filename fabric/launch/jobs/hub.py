"""The hub, as whoever brings instances sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol


class OwnInstanceLike(Protocol):
    """What the hub says of an instance of one's own."""

    @property
    def instance(self) -> str:
        """Its id."""

    @property
    def connected(self) -> bool:
        """Whether the hub has its session."""

    @property
    def num_running(self) -> int:
        """Rows that run."""

    @property
    def num_waiting(self) -> int:
        """Rows that wait."""


class InstanceHub(Protocol):
    """The hub, as somebody who brings instances sees it (``fabric.sdk.Fabric``)."""

    def add_instance(
        self,
        model: str,
        machine: str,
        *,
        sharing: str,
        overflow: bool | None,
        lifetime_s: float,
    ) -> Mapping[str, object]:
        """Return the permission to start an instance, a ``Launch`` as JSON."""

    def instances(self) -> Sequence[OwnInstanceLike]:
        """Return the caller's instances."""

    def expect_instance(self, instance: str, ready_in_s: float) -> None:
        """Say when an instance should have joined."""

    def drain_instance(self, instance: str) -> None:
        """Ask an instance to finish what it has and leave."""

    def end_instance(self, instance: str, reason: str, *, failed: bool = False) -> None:
        """Void an instance's token."""

    def report_job(self, instance: str, job: Mapping[str, object]) -> object:
        """Note what an instance's job took; the same again changes nothing."""

    def report_balance(self, instance: str, balance: Mapping[str, object]) -> None:
        """Note what the account has left that pays for an instance."""
