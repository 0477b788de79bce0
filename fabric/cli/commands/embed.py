"""``fabric embed``: texts as vectors."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from fabric.cli.money import su
from fabric.cli.options import client_options, read_prompt
from fabric.cli.output import Output, facts_line, note

if TYPE_CHECKING:
    from fabric.sdk import Fabric


@click.command()
@click.argument("texts", nargs=-1, metavar="[TEXT]...")
@click.option("--model", metavar="NAME[@REVISION]", help="The model to ask.")
@click.option(
    "--pooling",
    type=click.Choice(["mean", "last"]),
    help="Which hidden states make a vector, if not those the model was made for.",
)
@click.option("--site", "sites", multiple=True, help="May serve it; repeatable.")
@client_options
def embed(texts: tuple[str, ...], fabric: Fabric, output: Output, **options: Any) -> None:
    """Print the vector of each TEXT, or of each line of standard input, as a JSON array a line."""
    if texts in ((), ("-",)):
        prompt = read_prompt(texts[0] if texts else None)
        texts = tuple(line for line in prompt.splitlines() if line.strip())
    given = {name: value for name, value in options.items() if value not in (None, ())}
    answer = fabric.embed(texts, **given)
    if output.is_json:
        output.json(answer.to_reply())
        return
    for vector in answer.vectors:
        click.echo(json.dumps(vector.tolist()))
    sys.stdout.flush()
    tokens = f"{answer.usage.prompt_tokens} tokens"
    note(facts_line(", ".join(answer.sites), answer.model, tokens, f"{su(answer.charge_usu)} SU"))
