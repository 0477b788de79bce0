"""What the broker tells whoever counts: metrics hang on here."""

from __future__ import annotations

from typing import Protocol

from fabric.messages import Placement, Request, RunState, Usage


class Observer(Protocol):
    """Hears of every run. Called on the event loop, so each method must be quick and not raise.

    ``model`` is the catalogued name of the model, without its revision.
    """

    def run_admitted(self, model: str, request: Request) -> None:
        """The largest charge is held; the run has begun."""

    def run_placed(self, model: str, placement: Placement, attempt: int) -> None:
        """An attempt goes to a replica; ``attempt`` counts from 1."""

    def first_token(self, model: str, seconds: float) -> None:
        """The first token came, ``seconds`` after the request."""

    def token(self, model: str) -> None:
        """A token was passed on to the client."""

    def run_ended(
        self,
        model: str,
        state: RunState,
        usage: Usage,
        *,
        e2e_s: float,
        charge_usu: int,
        failure_code: str | None,
    ) -> None:
        """The run is over; ``state`` is final, ``failure_code`` is ``None`` if it completed."""


class Silent:
    """The observer that counts nothing."""

    def run_admitted(self, model: str, request: Request) -> None:
        """Ignore it."""

    def run_placed(self, model: str, placement: Placement, attempt: int) -> None:
        """Ignore it."""

    def first_token(self, model: str, seconds: float) -> None:
        """Ignore it."""

    def token(self, model: str) -> None:
        """Ignore it."""

    def run_ended(
        self,
        model: str,
        state: RunState,
        usage: Usage,
        *,
        e2e_s: float,
        charge_usu: int,
        failure_code: str | None,
    ) -> None:
        """Ignore it."""
