"""Weights from one job to another: where a job gives its files, and the tickets that it takes."""

from __future__ import annotations

import hashlib
import hmac

from pydantic import Field

from fabric.messages.wire import Wire

_URL = r"^http://[A-Za-z0-9][A-Za-z0-9.-]{0,252}:[1-9]\d{0,4}$"


class WeightsOffer(Wire):
    """A job gives its version's files at ``url``, to whoever shows a ticket made with ``key``."""

    url: str = Field(pattern=_URL)
    key: str = Field(pattern=r"^[0-9a-f]{64}$", repr=False)


class WeightsSource(Wire):
    """A job that gives the files of the asker's version, and the asker's ticket for it."""

    instance: str
    url: str = Field(pattern=_URL)
    ticket: str = Field(repr=False)


def make_ticket(key: str, instance: str, expires_at: float) -> str:
    """Return what lets one launch fetch from one job.

    Args:
        key: The giving job's.
        instance: Who fetches.
        expires_at: Until when, in epoch seconds.
    """
    told = f"{instance}.{expires_at:.0f}"
    return f"{told}.{_sign(key, told)}"


def takes_ticket(key: str, ticket: str, now: float) -> bool:
    """Return whether a ticket was made with a key and is good now, in epoch seconds."""
    told, _, signature = ticket.rpartition(".")
    expires = told.rpartition(".")[2]
    if not hmac.compare_digest(_sign(key, told).encode(), signature.encode()):
        return False
    return now < float(expires)


def _sign(key: str, text: str) -> str:
    return hmac.new(bytes.fromhex(key), text.encode(), hashlib.sha256).hexdigest()
