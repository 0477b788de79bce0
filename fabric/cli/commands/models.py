"""``fabric models``: what may be asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from fabric.cli.options import client_options
from fabric.cli.output import Column, Output

if TYPE_CHECKING:
    from fabric.sdk import Fabric


@click.command()
@client_options
def models(fabric: Fabric, output: Output) -> None:
    """List the models, their versions and where they run."""
    known = fabric.models()
    if output.is_json:
        output.json(known)
        return
    output.table(
        ["MODEL", "DIGEST", Column("CONTEXT", numeric=True), "SITES"],
        [
            (
                model.id,
                model.digest[:19] if model.digest else "not seen yet",
                model.context_tokens,
                ", ".join(sorted({r.site for r in model.replicas if r.state == "ready"})) or "none",
            )
            for model in known
        ],
        empty="The hub has no models; an administrator adds them with `fabric-admin model add`.",
    )
