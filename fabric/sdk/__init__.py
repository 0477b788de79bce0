"""The client: ask the fabric from Python.

::

    from fabric.sdk import Fabric

    with Fabric() as fabric:
        answer = fabric.chat("Which planet is the largest?", max_tokens=32)
        print(answer.text, answer.site, answer.charge_usu)

It speaks HTTP and nothing else. Importing it imports no HTTP library, no model library and none of
the hub's rooms, so that it costs nothing in a script that may not need it.
"""

from fabric.sdk.adapters import Adapter
from fabric.sdk.aio import AsyncFabric
from fabric.sdk.batches import Batch
from fabric.sdk.client import Fabric, FabricFuture
from fabric.sdk.embeddings import Embeddings, EmbedOptions
from fabric.sdk.instances import OwnInstance
from fabric.sdk.options import Message, Options
from fabric.sdk.records import (
    Allocation,
    Model,
    Replica,
    Run,
    Site,
    Spend,
    Statement,
    StatementLine,
    Ticket,
    WhoAmI,
)
from fabric.sdk.results import Choice, Chunk, Completion, ToolCall, Usage
from fabric.sdk.stream import AsyncStream, Stream
from fabric.sdk.tiers import Attained, Duration, Estimate, Queue, SiteEstimate

__all__ = [
    "Adapter",
    "Allocation",
    "AsyncFabric",
    "AsyncStream",
    "Attained",
    "Batch",
    "Choice",
    "Chunk",
    "Completion",
    "Duration",
    "EmbedOptions",
    "Embeddings",
    "Estimate",
    "Fabric",
    "FabricFuture",
    "Message",
    "Model",
    "Options",
    "OwnInstance",
    "Queue",
    "Replica",
    "Run",
    "Site",
    "SiteEstimate",
    "Spend",
    "Statement",
    "StatementLine",
    "Stream",
    "Ticket",
    "ToolCall",
    "Usage",
    "WhoAmI",
]
