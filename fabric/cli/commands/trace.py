"""``fabric trace``: programs that were written to a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from fabric.cli.money import su
from fabric.cli.options import client_options
from fabric.cli.output import Column, Output, note

if TYPE_CHECKING:
    from fabric.sdk import Fabric
    from fabric.sdk.programs import ProgramResult, Quote


@click.group()
def trace() -> None:
    """Run intervention programs; `fabric.trace` in Python writes them."""


@trace.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--constants", type=click.Path(path_type=Path), help="Its safetensors file.")
@click.option("--model", metavar="NAME[@REVISION]", help="The model, if FILE does not say.")
@click.option("--quote", is_flag=True, help="Only tell what it would take at most.")
@click.option(
    "--output",
    "target",
    type=click.Path(path_type=Path),
    help="Where the saves go, as one safetensors file.",
)
@click.option("--site", "sites", multiple=True, help="May serve it; repeatable.")
@client_options
def run(
    file: Path,
    constants: Path | None,
    model: str | None,
    quote: bool,
    target: Path | None,
    sites: tuple[str, ...],
    fabric: Fabric,
    output: Output,
) -> None:
    """Run the program of FILE: JSON, with its constants inline or in a file of their own."""
    from fabric.sdk.files import read_program, write_result

    program, named = read_program(file, constants)
    model = model or named
    if quote:
        _print_quote(fabric.quote_program(program, model=model, sites=sites or None), output)
        return
    result = fabric.run_program(program, model=model, sites=sites or None)
    if target is not None:
        write_result(target, result)
    _print_result(result, output)
    if target is not None:
        note(f"The saves are in {target}.")
    elif not output.is_json:
        note("--output FILE keeps the saves.")


def _print_quote(quote: Quote, output: Output) -> None:
    if output.is_json:
        output.json(quote)
        return
    output.facts(
        [
            ("model", quote.model),
            ("costs at most", f"{su(quote.charge_usu_max)} SU"),
            ("operations", f"{quote.num_flops:.3g}"),
            ("prompt tokens", quote.num_prompt_tokens),
            ("comes back", f"{quote.result_bytes:,} bytes at most"),
            ("goes in", f"{quote.hook_bytes_in:,} bytes"),
            ("needs", ", ".join(quote.scopes)),
        ]
    )


def _print_result(result: ProgramResult, output: Output) -> None:
    saves = [
        (run.id, name, list(array.shape), str(array.dtype))
        for run in result.runs
        for name, array in run.arrays.items()
    ]
    if output.is_json:
        texts = {run.id: run.text for run in result.runs if run.tokens}
        output.json(
            {
                "model": result.model,
                "digest": result.digest,
                "site": result.site,
                "run": result.run_id,
                "charge_usu": result.charge_usu,
                "usage": result.usage,
                "saves": [
                    dict(zip(("run", "save", "shape", "dtype"), save, strict=True))
                    for save in saves
                ],
                "texts": texts,
            }
        )
        return
    output.table(["RUN", "SAVE", Column("SHAPE"), "DTYPE"], saves, empty="Nothing was saved.")
    for run in result.runs:
        if run.tokens:
            click.echo(f"\n{run.id}: {run.text}")
    note(result.summary)
