"""What is sent to an instance for one attempt of a run."""

from __future__ import annotations

from hashlib import blake2b

from fabric.broker.progress import Progress
from fabric.broker.settings import BrokerSettings
from fabric.messages import Task


class Tasks:
    """Makes tasks.

    Args:
        settings: Limits.
        salt_key: A secret, from which each project gets the salt of its cached prefixes.
    """

    def __init__(self, settings: BrokerSettings, salt_key: bytes) -> None:
        self._settings = settings
        self._salt_key = salt_key

    def get(self, run: Progress, attempt: int, now: float) -> Task:
        """Return the task of an attempt that goes on after the tokens delivered so far."""
        return Task(
            id=run.ticket.request.id,
            attempt=attempt,
            request=run.ticket.request,
            digest=run.ticket.digest,
            prefix=tuple(run.token_ids),
            deadline_s=max(run.deadline_at - now, 0.001),
            window=self._settings.window_events,
            cache_salt=self._get_salt(run.ticket.project),
            adapter=run.ticket.adapter,
        )

    def _get_salt(self, project: str) -> str:
        """Return what lets a project's requests share prefixes, and nobody else's with them."""
        return blake2b(project.encode(), key=self._salt_key, digest_size=16).hexdigest()
