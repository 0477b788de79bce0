"""``fabric lens``: what each layer, or each head, would say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fabric.cli.options import client_options, read_prompt
from fabric.cli.output import Output, note

if TYPE_CHECKING:
    from fabric.sdk import Fabric
    from fabric.sdk.heatmap import Heatmap

_CELL = 9
"""Columns of the screen for one cell."""


@click.command()
@click.argument("model")
@click.argument("prompt", required=False)
@click.option("--heads", is_flag=True, help="What each attention head adds, at one position.")
@click.option(
    "--position", type=int, default=-1, show_default=True, help="Of --heads: which token."
)
@click.option("--layer", "layers", type=int, multiple=True, help="Only this one; repeatable.")
@click.option(
    "--output",
    "path",
    type=click.Path(path_type=Path),
    help="Write the heat map as a .png or .html file instead.",
)
@client_options
def lens(
    model: str,
    prompt: str | None,
    heads: bool,
    position: int,
    layers: tuple[int, ...],
    path: Path | None,
    fabric: Fabric,
    output: Output,
) -> None:
    """Show what MODEL would say next after each layer, at each token of PROMPT.

    The hidden states of every layer go through the model's last norm and its unembedding. Each
    cell has the likeliest token; its colour is how likely that is.
    """
    from fabric.sdk.recipes import attention_lens, logit_lens

    text = read_prompt(prompt)
    if path is not None and path.suffix.lower() not in (".png", ".html"):
        raise click.UsageError("--output is a .png or a .html file.")
    if heads:
        found = attention_lens(
            model, text, layers=layers or None, position=position, backend=fabric
        )
    else:
        found = logit_lens(model, text, layers=layers or None, backend=fabric)
    if path is not None:
        found.save(path)
    if output.is_json:
        output.json(
            {
                "rows": found.rows,
                "columns": found.columns,
                "words": found.words,
                "ids": found.ids[:, :, 0].tolist(),
                "probabilities": found.probabilities[:, :, 0].tolist(),
                "site": found.result.site,
                "charge_usu": found.result.charge_usu,
            }
        )
    elif path is None:
        _show(found.heatmap, output)
    note(found.result.summary if path is None else f"{path} · {found.result.summary}")


def _show(heatmap: Heatmap, output: Output) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False) if output.is_terminal else None
    width = console.width if console is not None else 80
    for page in _pages(heatmap, width):
        for line in page:
            if console is None:
                click.echo("".join(text for text, _ in line).rstrip())
            else:
                console.print(Text.assemble(*line, no_wrap=True, overflow="crop"))
        click.echo()


def _pages(heatmap: Heatmap, width: int) -> Iterator[list[list[tuple[str, str]]]]:
    """Yield screens of lines of (text, style): as many columns as fit, all rows."""
    from fabric.sdk.heatmap import ink, shown

    left = max(map(len, heatmap.rows)) + 1
    fit = max((width - left) // _CELL, 1)
    for begin in range(0, len(heatmap.columns), fit):
        some = range(begin, min(begin + fit, len(heatmap.columns)))
        lines: list[list[tuple[str, str]]] = []
        for row in reversed(range(len(heatmap.rows))):
            line = [(heatmap.rows[row].ljust(left), "dim")]
            for column in some:
                colour = heatmap.colour(float(heatmap.values[row][column]))
                style = f"{_rgb(ink(colour))} on {_rgb(colour)}"
                line.append((_fitted(shown(heatmap.cells[row][column], _CELL - 1)), style))
            lines.append(line)
        heads = [(_fitted(shown(heatmap.columns[column], _CELL - 1)), "bold") for column in some]
        lines.append([(" " * left, ""), *heads])
        yield lines


def _rgb(colour: Sequence[int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _fitted(text: str) -> str:
    """Return the text in a cell's columns of the screen, whatever its characters take."""
    from rich.cells import set_cell_size

    return set_cell_size(text, _CELL - 1) + " "
