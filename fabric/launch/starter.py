"""What starts instances at a site, whichever way: a Parsl block of our own, or an endpoint's."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Protocol

from fabric.messages import InstanceSpec, InstanceState, InstanceStatus


class Launched(Protocol):
    """An instance that was asked for. Calls may block for some milliseconds."""

    @property
    def spec(self) -> InstanceSpec:
        """What was asked for."""

    @property
    def ended(self) -> Future[object]:
        """Done once the instance has ended: with its exit code, or why its worker was lost."""

    @property
    def log_path(self) -> object:
        """Where the instance writes its output, as an administrator would look for it."""

    def status(self) -> InstanceStatus | None:
        """Return what the instance last said of itself, or ``None`` before that."""

    def stop(self) -> bool:
        """Ask the instance to finish its tasks and leave; return whether there was one to ask."""


class Starter(Protocol):
    """Starts instances of one site. Used from one thread at a time."""

    poll_s: float
    """How often it is worth asking for a status."""

    drain_s: float
    """How long an instance that was asked to leave may take, beyond its requests' own time."""

    def start(self) -> None:
        """Get ready to launch.

        Raises:
            LaunchError: Nothing can be started at this site, and why.
        """

    def revive(self) -> None:
        """Get ready again if what ``start`` made has gone; harmless otherwise.

        Raises:
            LaunchError: As ``start``.
        """

    def launch(self, spec: InstanceSpec) -> Launched:
        """Ask for an instance and return at once."""

    def stop(self) -> None:
        """End all that was started here. Calling it twice is harmless."""


def why_ended(launched: Launched) -> str:
    """Return why an instance ended, in its own words if it had any."""
    if not launched.ended.done():
        return "it was stopped before its requests were done"
    error = launched.ended.exception()
    if error is not None:
        return f"its worker was lost ({error})"
    status = launched.status()
    if status is not None and InstanceState(status.state).final and status.detail:
        return status.detail.rstrip(".")
    return f"its process ended with code {launched.ended.result()}"
