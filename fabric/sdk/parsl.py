"""Parsl apps that ask the fabric.

::

    ask = query_app(max_tokens=64)
    answers = [ask(f"Summarize: {text}") for text in texts]     # AppFutures
    print([answer.result().text for answer in answers])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, Unpack, cast

from fabric.sdk.client import Fabric
from fabric.sdk.options import Options, Prompt
from fabric.sdk.results import Completion

if TYPE_CHECKING:
    from parsl.dataflow.futures import AppFuture


def query_app(
    *,
    executors: Sequence[str] | Literal["all"] = "all",
    cache: bool = False,
    base_url: str | None = None,
    api_key: str | None = None,
    **options: Unpack[Options],
) -> Callable[[Prompt], AppFuture]:
    """Return a Parsl app from a prompt to its ``Completion``, for thread and HTEX executors.

    A conversation is answered; so is a text, as a single question. On a remote worker the hub's
    address and key come from the worker's own settings unless they are given here.

    Args:
        executors: The labels of the executors it may run on.
        cache: Whether Parsl may return an earlier answer to the same prompt.
        base_url: The hub's address.
        api_key: The credential; it travels with every task, so prefer the workers' settings.
        **options: What every request carries.
    """
    import parsl

    app = parsl.python_app(answer, executors=executors, cache=cache)

    def ask(prompt: Prompt) -> AppFuture:
        return app(prompt, base_url, api_key, dict(options))

    return ask


def answer(
    prompt: Prompt, base_url: str | None, api_key: str | None, options: dict[str, Any]
) -> Completion:
    """Answer one prompt; this is what runs on the worker.

    Raises:
        FabricError: The request was refused, could not be placed, or failed.
    """
    # A worker imports this module by name: nothing of the caller's has to be shipped with a task.
    from fabric.sdk.parsl import get_client

    return get_client(base_url, api_key).chat(prompt, **cast("Options", options))


@lru_cache(maxsize=8)
def get_client(base_url: str | None, api_key: str | None) -> Fabric:
    """Return this process's client, whose connections its tasks share."""
    return Fabric(base_url, api_key)
