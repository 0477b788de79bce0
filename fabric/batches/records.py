"""Records of files and batches, and the limits they keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

Json = dict[str, object]

ENDPOINTS = ("/v1/chat/completions", "/v1/completions")
COMPLETION_WINDOW = "24h"
COMPLETION_WINDOW_S = 86_400.0
DAY_S = 86_400.0

BatchStatus = Literal[
    "validating",
    "in_progress",
    "finalizing",
    "completed",
    "failed",
    "expired",
    "cancelling",
    "cancelled",
]
"""*validating*: the input is read. *in_progress*: lines are asked. *finalizing* (or *cancelling*,
once that was asked for): the results become files. The others are final; *failed*: the input is not
valid, or the caller may not ask any more; *expired*: the completion window closed first."""

OPEN = ("validating", "in_progress", "finalizing", "cancelling")


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSettings:
    """How files are kept and batches run.

    Args:
        file_bytes: The largest file; a larger one is refused.
        project_bytes: What the files of one project may take together.
        num_lines: The most lines of a batch.
        line_bytes: The longest line.
        file_ttl_s: How long files are kept.
        num_parallel: Lines of one batch that are under way at once.
        num_batches: Batches a hub works on at once; the others wait.
        share: The part of a model's rows that batches may take, as long as nobody else does.
        line_deadline_s: What a line is given that does not say.
        max_tries: How often a line is tried that fails for no fault of its own.
        max_backoff_s: The longest pause between two tries.
        poll_s: How often the database is asked what is to be done.
        lease_s: How long a batch waits for a hub that was killed, before another takes it up.
        sweep_s: How often expired files are removed.
    """

    file_bytes: int = 200 * 2**20
    project_bytes: int = 4 * 2**30
    num_lines: int = 50_000
    line_bytes: int = 8 * 2**20
    file_ttl_s: float = 30 * DAY_S
    num_parallel: int = 32
    num_batches: int = 32
    share: float = 0.75
    line_deadline_s: float = 3600.0
    max_tries: int = 8
    max_backoff_s: float = 15.0
    poll_s: float = 1.0
    lease_s: float = 15.0
    sweep_s: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """A file of a project: the input of batches (``batch``), or their output (``batch_output``)."""

    id: str
    project: str
    filename: str
    purpose: str
    num_bytes: int
    created_at: datetime
    expires_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRecord:
    """A batch as it is now.

    ``life`` counts how often it was taken up: it makes the ids of runs that a killed hub had begun
    differ from those that are begun anew. ``runner`` works on it until its lease runs out.
    """

    id: str
    project: str
    key_id: str
    endpoint: str
    input_file: str
    output_file: str | None
    error_file: str | None
    output_ttl_s: float
    model: str | None
    metadata: Mapping[str, str]
    status: BatchStatus
    errors: list[Json]
    num_lines: int
    num_completed: int
    num_failed: int
    charge_usu: int
    life: int
    runner: str | None
    lease_expires_at: datetime | None
    created_at: datetime
    in_progress_at: datetime | None
    cancelling_at: datetime | None
    finalizing_at: datetime | None
    ended_at: datetime | None
    expires_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """Where a request stands in its input file. ``number`` counts from 1, as editors do."""

    number: int
    custom_id: str
    offset_bytes: int
    num_bytes: int
