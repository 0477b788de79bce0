"""``fabric-admin model``."""

from __future__ import annotations

import click

from fabric.cli.admin.change import Change, change_options, require_some
from fabric.cli.admin.database import Books, database_options, yes_option
from fabric.cli.output import Column, Output, short_digest


@click.group()
def model() -> None:
    """Versions of models that may be asked.

    \b
    Example:
      fabric-admin model add gpt2 --source /models/gpt2 --context-tokens 1024
    """


@model.command()
@click.argument("name")
@click.option("--revision", default="1", show_default=True, help="Which version of it.")
@click.option("--source", required=True, help="Where the weights are, as sites read it.")
@click.option(
    "--context-tokens",
    type=click.IntRange(min=1),
    required=True,
    help="The most tokens of prompt and answer together.",
)
@click.option("--dtype", help="What it is computed in; otherwise the sites choose.")
@click.option("--digest", help="Of the tensors; otherwise the first instance to report fixes it.")
@change_options
def add(
    name: str,
    revision: str,
    source: str,
    context_tokens: int,
    dtype: str | None,
    digest: str | None,
    books: Books,
    change: Change,
) -> None:
    """Add a version, which NAME alone means from now on.

    \b
    Example:
      fabric-admin model add gpt2 --source /models/gpt2 --context-tokens 1024
    """
    given = {
        "source": source,
        "context_tokens": context_tokens,
        "dtype": dtype,
        "digest": digest,
    }
    change.add(
        f"model {name}@{revision}",
        lambda: books.catalog.add_model(
            name, revision, context_tokens=context_tokens, source=source, dtype=dtype, digest=digest
        ),
        lambda: books.catalog.resolve(f"{name}@{revision}"),
        given,
    )


@model.command()
@click.argument("ref", metavar="[NAME[@REVISION]]", required=False)
@database_options
def show(ref: str | None, books: Books, output: Output) -> None:
    """List the versions, or show one.

    \b
    Example:
      fabric-admin model show gpt2@1
    """
    if ref:
        output.record(books.catalog.resolve(ref))
        return
    records = books.catalog.models()
    if output.is_json:
        output.json(records)
        return
    output.table(
        ["MODEL", "DIGEST", Column("CONTEXT", numeric=True), "DTYPE", "SOURCE"],
        [
            (m.ref, short_digest(m.digest), m.context_tokens, m.dtype or "any", m.source)
            for m in records
        ],
    )


@model.command()
@click.argument("ref", metavar="NAME[@REVISION]")
@click.option("--source", help="Where the weights are, as sites read it.")
@click.option(
    "--context-tokens",
    type=click.IntRange(min=1),
    help="The most tokens of prompt and answer together.",
)
@click.option("--dtype", help="What it is computed in.")
@change_options
def modify(
    ref: str,
    source: str | None,
    context_tokens: int | None,
    dtype: str | None,
    books: Books,
    change: Change,
) -> None:
    """Change a version; its digest stays what it is.

    \b
    Example:
      fabric-admin model modify gpt2@1 --source /scratch/models/gpt2
    """
    options = {"--source": source, "--context-tokens": context_tokens, "--dtype": dtype}
    require_some("model", ref, options)
    before = books.catalog.resolve(ref)
    after = books.catalog.modify_model(
        ref, source=source, context_tokens=context_tokens, dtype=dtype
    )
    change.tell("changed", f"model {after.ref}", after, before=before)


@model.command()
@click.argument("ref", metavar="NAME[@REVISION]")
@yes_option
@change_options
def delete(ref: str, yes: bool, books: Books, change: Change) -> None:
    """Forget a version; its runs stay on record.

    \b
    Example:
      fabric-admin model delete gpt2@1 --dry-run
    """
    record = books.catalog.resolve(ref)
    change.confirm(f"Delete the model {record.ref}?", yes=yes)
    record = books.catalog.delete_model(ref)
    change.tell("deleted", f"model {record.ref}", record)
