"""Batches: many requests in one file, answered on idle capacity, each charged if it is answered.

Files and batches are those of the OpenAI API. The room knows lines and their books; who answers a
line is an ``Answerer``, which the hub's composition gives it.
"""

from fabric.batches.answerer import Answer, Answerer, Rows
from fabric.batches.batches import Batches
from fabric.batches.records import (
    COMPLETION_WINDOW,
    ENDPOINTS,
    BatchRecord,
    BatchSettings,
    FileRecord,
)

__all__ = [
    "COMPLETION_WINDOW",
    "ENDPOINTS",
    "Answer",
    "Answerer",
    "BatchRecord",
    "BatchSettings",
    "Batches",
    "FileRecord",
    "Rows",
]
