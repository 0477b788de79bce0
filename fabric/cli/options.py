"""Options that commands share, and what they make of them."""

# ruff: noqa: ARG001 - the signatures are click's.

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click

from fabric.cli.exits import FORMAT
from fabric.cli.output import Output

Command = TypeVar("Command", bound=Callable[..., Any])

_LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)
_TELLTALES = ("uvicorn.error", "websockets")
"""Loggers that write down whole frames if they may: prompts, answers and tokens."""


def output_options(function: Command) -> Command:
    """Add ``--format`` and ``-v``; the function gets ``output``."""

    @click.option(
        "--format",
        "output_format",
        type=click.Choice(["text", "json"]),
        default="text",
        show_default=True,
        is_eager=True,
        expose_value=False,
        callback=_remember_format,
        help="How data and errors are printed.",
    )
    @click.option(
        "-v",
        "--verbose",
        count=True,
        expose_value=False,
        callback=_configure_logging,
        help="Log to standard error; twice for more.",
    )
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        meta = click.get_current_context().find_root().meta
        return function(*args, output=Output(is_json=meta.get(FORMAT) == "json"), **kwargs)

    return wrapper  # type: ignore[return-value]


def client_options(function: Command) -> Command:
    """Add ``--base-url``, ``--api-key`` and ``--project`` to those of ``output_options``.

    The function gets ``fabric``, a client that is closed after it, and ``output``.
    """

    @output_options
    @click.option("--base-url", metavar="URL", help="The hub's address.")
    @click.option(
        "--api-key", metavar="KEY", help="The API key; better in FABRIC_API_KEY or a file."
    )
    @click.option("--project", metavar="NAME", help="For which of your projects to act.")
    @functools.wraps(function)
    def wrapper(
        *args: Any, base_url: str | None, api_key: str | None, project: str | None, **kwargs: Any
    ) -> Any:
        from fabric.sdk import Fabric

        with Fabric(base_url, api_key, project=project) as fabric:
            return function(*args, fabric=fabric, **kwargs)

    return wrapper  # type: ignore[return-value]


def request_options(function: Command) -> Command:
    """Add what may be said about a request; the function gets ``options``, those given."""

    @click.option("--model", metavar="NAME[@REVISION]", help="The model to ask.")
    @click.option("--adapter", metavar="NAME", help="One of your project's adapters.")
    @click.option("--max-tokens", type=click.IntRange(min=1), help="The most tokens to generate.")
    @click.option(
        "--temperature", type=click.FloatRange(0, 2), help="0 always takes the likeliest token."
    )
    @click.option("--seed", type=int, help="Makes sampling repeatable.")
    @click.option("--stop", multiple=True, metavar="TEXT", help="Ends the answer; repeatable.")
    @click.option("--site", "sites", multiple=True, help="May serve it; repeatable.")
    @click.option(
        "--overflow",
        is_flag=True,
        default=None,
        help="It may leave instances of your own, which keep it otherwise.",
    )
    @click.option("--data-site", metavar="SITE", help="Where the request's data lives.")
    @click.option("--data-bytes", type=click.IntRange(min=0), help="How much data that is.")
    @click.option("--policy", type=click.Choice(["balanced", "fastest", "cheapest", "local-only"]))
    @click.option(
        "--deadline",
        "deadline_s",
        type=click.FloatRange(0, 86_400, min_open=True),
        metavar="SECONDS",
        help="Give up after this long.",
    )
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        options = {name: kwargs.pop(name) for name in _REQUEST_OPTIONS}
        given = {name: value for name, value in options.items() if value not in (None, ())}
        return function(*args, options=given, **kwargs)

    return wrapper  # type: ignore[return-value]


_REQUEST_OPTIONS = (
    *("model", "adapter", "max_tokens", "temperature", "seed", "stop", "sites"),
    *("overflow", "data_site", "data_bytes", "policy", "deadline_s"),
)


def read_prompt(prompt: str | None) -> str:
    """Return the prompt, from standard input if it is ``-`` or was left out of a pipe.

    Raises:
        click.UsageError: There is none, or it is not text.
    """
    if prompt is None and sys.stdin.isatty():
        raise click.UsageError("Give a PROMPT, or - to read it from standard input.")
    if prompt in (None, "-"):
        try:
            prompt = sys.stdin.buffer.read().decode()
        except UnicodeDecodeError as error:
            raise click.UsageError("Standard input is not text in UTF-8.") from error
    assert prompt is not None
    if not prompt.strip():
        raise click.UsageError("The prompt is empty.")
    return prompt


def _remember_format(ctx: click.Context, param: click.Parameter, value: str) -> None:
    ctx.find_root().meta[FORMAT] = value


def _configure_logging(ctx: click.Context, param: click.Parameter, value: int) -> None:
    logging.basicConfig(
        level=_LEVELS[min(value, 2)],
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    for name in _TELLTALES:
        logging.getLogger(name).setLevel(logging.INFO)
    if not value:
        # What Parsl says of a submission is in our errors.
        logging.getLogger("parsl").setLevel(logging.CRITICAL)
