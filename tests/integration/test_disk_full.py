"""A hub whose disk is full refuses, keeps its books, and goes on when there is room again."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from fabric.testing.hub import MODEL, PROJECT, RunningHub, running_hub, wait_until

PATIENCE_S = 60.0


@contextmanager
def full_disk() -> Iterator[None]:
    """Let nothing more be written to any file of this process, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def ask(hub: RunningHub) -> httpx.Response:
    return httpx.post(
        f"{hub.base_url}/v1/completions",
        headers={"authorization": f"Bearer {hub.api_key}"},
        json={"model": MODEL, "prompt": "one two three", "max_tokens": 4},
        timeout=PATIENCE_S,
    )


def test_a_full_disk_is_507_and_the_books_stay_right(tmp_path: Path) -> None:
    with running_hub(tmp_path, sites=("alpha",)) as hub:
        (before,) = hub.ledger.allocations(PROJECT)
        with full_disk():
            refused = ask(hub)
            assert refused.status_code == 507, refused.text
            assert refused.json()["error"]["code"] == "storage_full"
            # A look at the database may need room for itself.
            health = httpx.get(f"{hub.base_url}/healthz", timeout=PATIENCE_S)
            assert health.json()["database"] in ("ok", "storage_full")
        assert ask(hub).status_code == 200
        wait_until(lambda: hub.ledger.allocations(PROJECT)[0].held_usu == 0, timeout_s=PATIENCE_S)
        (after,) = hub.ledger.allocations(PROJECT)
        assert before.available_usu - after.available_usu == 3 * 1 + 4 * 2
        hub.ledger.verify()
