"""Who answers the lines of a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from fabric.auth import Identity
from fabric.batches.records import Json
from fabric.errors import FabricError

Write = Callable[[], bool]
"""Writes a line's result on the database's thread; false if there is one already."""


@dataclass(frozen=True, slots=True)
class Rows:
    """What the replicas of a model can compute at once, and do now."""

    num_rows: int
    num_busy: int


class Answer(Protocol):
    """An answer that is not charged yet."""

    @property
    def request_id(self) -> str:
        """The id of its first run."""

    @property
    def body(self) -> Json:
        """What the endpoint would reply."""

    @property
    def charge_usu(self) -> int:
        """What it costs."""

    async def keep(self, write: Write) -> None:
        """Charge the answer in the transaction of ``write``, and only if that returns true."""


class Answerer(Protocol):
    """Answers requests, each as one of OpenAI's endpoints would."""

    async def find(self, caller: Identity, model: str) -> str:
        """Return a model's catalogued name.

        Raises:
            UnknownModel: There is none that the caller may use.
        """

    def rows(self, model: str) -> Rows:
        """Return how busy the replicas of a catalogued model are."""

    async def answer(
        self, caller: Identity, endpoint: str, body: Json, *, seed: str, deadline_s: float
    ) -> Answer:
        """Answer one request. Cancelled, it leaves nothing running and nothing charged.

        Args:
            caller: Whose project pays.
            endpoint: One of ``ENDPOINTS``.
            body: What its clients send.
            seed: Gives the runs their ids; the same seed gives the same.
            deadline_s: When to give up, unless the body says.

        Raises:
            FabricError: It was refused, or failed; nothing is charged.
        """

    def refusal(self, error: FabricError) -> Json:
        """Return the body that tells a client of an error."""
