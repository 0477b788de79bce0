"""What the stand-in is told at its start."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from fabric.testing.globus.rabbit import BrokerAddress

MIB = 2**20


class PublishedLimits(BaseModel):
    """What the hosted service allows a user.

    Source: ``docs/limits.rst`` of globus-compute; the size is what its endpoint 4.19 holds results
    to (``engines/helper.py``).

    Attributes:
        requests: Requests a user may make in ``window_s`` seconds.
        window_s: That window.
        payload_bytes: The largest function, submission (all tasks together) or result, as sent.
        result_kept_s: How long a result waits for its user.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests: int = 20
    window_s: float = 10.0
    payload_bytes: int = 10 * MIB
    result_kept_s: float = 1800.0


class ServiceSettings(BaseModel):
    """Where the stand-in listens and what it knows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    port: int
    database: Path
    directory: Path
    broker: BrokerAddress

    limits: PublishedLimits = PublishedLimits()

    @property
    def url(self) -> str:
        """Where it serves."""
        return f"http://127.0.0.1:{self.port}"
