"""How an answer looks on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from fabric.cli.money import su
from fabric.cli.output import facts_line, note, seconds

if TYPE_CHECKING:
    from fabric.sdk import Completion, Stream


def print_stream(stream: Stream) -> Completion:
    """Print an answer as it comes, and return it.

    Raises:
        FabricError: It broke off; what came before is on the terminal.
    """
    try:
        for chunk in stream:
            if chunk.because:
                note(f"\n[moved to {stream.site}: {chunk.because}]")
            click.echo(chunk.text, nl=False)
    finally:
        click.echo()
    return stream.result


def footer(answer: Completion) -> None:
    """Print where an answer came from, why, how fast and for how much."""
    rate = answer.tokens_per_s
    note(
        facts_line(
            why(answer.site, answer.reason),
            f"{answer.attempts} attempts" if answer.attempts > 1 else None,
            f"first token {seconds(answer.first_token_s)}" if answer.first_token_s else None,
            f"{rate:.1f} tokens/s" if rate else None,
            f"{su(answer.charge_usu)} SU",
        )
    )


def why(site: str, reason: str) -> str:
    """Return a site and why it was chosen."""
    return f"{site}: {reason.removeprefix(f'{site}: ')}"
