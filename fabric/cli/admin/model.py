"""``fabric-admin model``."""

from __future__ import annotations

import click

from fabric.cli.admin.database import Books, confirm, database_options, yes_option
from fabric.cli.output import Column, Output, note


@click.group()
def model() -> None:
    """Versions of models that may be asked."""


@model.command()
@click.argument("name")
@click.option("--revision", default="1", show_default=True)
@click.option("--source", required=True, help="Where the weights are, as sites read it.")
@click.option("--context-tokens", type=click.IntRange(min=1), required=True)
@click.option("--dtype", help="What it is computed in; otherwise the sites choose.")
@click.option("--digest", help="Of the tensors; otherwise the first instance to report fixes it.")
@database_options
def add(
    name: str,
    revision: str,
    source: str,
    context_tokens: int,
    dtype: str | None,
    digest: str | None,
    books: Books,
    output: Output,
) -> None:
    """Add a version, which NAME alone means from now on."""
    record = books.catalog.add_model(
        name, revision, context_tokens=context_tokens, source=source, dtype=dtype, digest=digest
    )
    output.json(record) if output.is_json else note(f"Added the model {record.ref}.")


@model.command()
@click.argument("ref", metavar="[NAME[@REVISION]]", required=False)
@database_options
def show(ref: str | None, books: Books, output: Output) -> None:
    """List the versions, or show one."""
    records = [books.catalog.resolve(ref)] if ref else books.catalog.models()
    if output.is_json:
        output.json(records[0] if ref else records)
        return
    output.table(
        ["MODEL", "DIGEST", Column("CONTEXT", numeric=True), "DTYPE", "SOURCE"],
        [
            (m.ref, m.digest or "not reported yet", m.context_tokens, m.dtype or "any", m.source)
            for m in records
        ],
    )


@model.command()
@click.argument("ref", metavar="NAME[@REVISION]")
@click.option("--source")
@click.option("--context-tokens", type=click.IntRange(min=1))
@click.option("--dtype")
@database_options
def modify(
    ref: str,
    source: str | None,
    context_tokens: int | None,
    dtype: str | None,
    books: Books,
    output: Output,
) -> None:
    """Change a version; its digest stays what it is."""
    record = books.catalog.modify_model(
        ref, source=source, context_tokens=context_tokens, dtype=dtype
    )
    output.json(record) if output.is_json else note(f"Changed the model {record.ref}.")


@model.command()
@click.argument("ref", metavar="NAME[@REVISION]")
@yes_option
@database_options
def delete(ref: str, yes: bool, books: Books, output: Output) -> None:
    """Forget a version; its runs stay on record."""
    record = books.catalog.resolve(ref)
    confirm(f"Delete the model {record.ref}?", yes=yes)
    record = books.catalog.delete_model(ref)
    output.json(record) if output.is_json else note(f"Deleted the model {record.ref}.")
