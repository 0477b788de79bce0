"""``fabric query``: ask one question."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from fabric.cli.answers import footer, print_stream
from fabric.cli.options import client_options, read_prompt, request_options
from fabric.cli.output import Output

if TYPE_CHECKING:
    from fabric.sdk import Fabric, Options


@click.command()
@click.argument("prompt", required=False)
@click.option("--raw", is_flag=True, help="Continue the text instead of answering it.")
@click.option("--no-stream", is_flag=True, help="Print the answer when it is complete.")
@request_options
@client_options
def query(
    prompt: str | None,
    raw: bool,
    no_stream: bool,
    options: Options,
    fabric: Fabric,
    output: Output,
) -> None:
    """Ask one question: PROMPT, or standard input for -.

    The answer goes to standard output, token by token on a terminal. Where it came from, why, how
    fast and for how much goes to standard error.
    """
    text = read_prompt(prompt)
    if output.is_terminal and not no_stream and not output.is_json:
        ask = fabric.stream if raw else fabric.stream_chat
        with ask(text, **options) as stream:
            answer = print_stream(stream)
    else:
        answer = (fabric.complete if raw else fabric.chat)(text, **options)
        if output.is_json:
            output.json(answer.to_reply())
            return
        click.echo(answer.text)
    sys.stdout.flush()
    footer(answer)
