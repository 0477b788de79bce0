"""``fabric chat``: talk with a model."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from fabric.cli.answers import footer, print_stream
from fabric.cli.options import client_options, request_options
from fabric.cli.output import Output, note
from fabric.errors import FabricError

if TYPE_CHECKING:
    from fabric.sdk import Fabric, Message, Options

HELP = "/clear forgets the conversation, /quit or Ctrl-D ends, Ctrl-C stops an answer."


@click.command()
@click.option("-m", "--message", metavar="TEXT", help="Say this, print the answer, and end.")
@click.option("--system", metavar="TEXT", help="What the model is told first.")
@request_options
@client_options
def chat(
    message: str | None, system: str | None, options: Options, fabric: Fabric, output: Output
) -> None:
    """Talk with a model; it is sent the whole conversation each time."""
    opening: list[Message] = [{"role": "system", "content": system}] if system else []
    if message is not None:
        turns = [*opening, {"role": "user", "content": message}]
        if output.is_json:
            output.json(fabric.chat(turns, **options).to_reply())
        else:
            answer_turn(fabric, turns, options)
        return
    if output.is_json:
        raise click.UsageError("--format json needs a message (-m).")
    if sys.stdin.isatty():
        # Importing it gives the prompt line editing and a history.
        import readline  # noqa: F401

        note(HELP)
    converse(fabric, opening, options)


def converse(fabric: Fabric, opening: list[Message], options: Options) -> None:
    """Read turns until there are no more."""
    turns = list(opening)
    while (line := _read_line()) not in (None, "/quit", "/exit"):
        if line == "/clear":
            turns = list(opening)
        elif line == "/help":
            note(HELP)
        elif line:
            turns.append({"role": "user", "content": line})
            try:
                turns.append(answer_turn(fabric, turns, options))
            except FabricError as error:
                if not sys.stdin.isatty():
                    raise
                turns.pop()
                click.echo(click.style("Error: ", fg="red", bold=True) + error.message, err=True)


def answer_turn(fabric: Fabric, turns: list[Message], options: Options) -> Message:
    """Print the answer to the last turn and return it as a turn; Ctrl-C keeps what has come."""
    stream = None
    try:
        with fabric.stream_chat(turns, **options) as stream:
            answer = print_stream(stream)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        note("[stopped]")
        return {"role": "assistant", "content": stream.text if stream else ""}
    footer(answer)
    return answer.message


def _read_line() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    except KeyboardInterrupt:
        click.echo()
        return ""
