"""``fabric points``: where programs may read and write in a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from fabric.cli.options import client_options
from fabric.cli.output import Column, Output

if TYPE_CHECKING:
    from fabric.messages import PointSpec
    from fabric.sdk import Fabric


@click.command()
@click.argument("model", required=False)
@client_options
def points(model: str | None, fabric: Fabric, output: Output) -> None:
    """List the points of MODEL's forward pass, by module and in its order.

    T are a run's positions and S its keys. A point that cannot be served says why.
    """
    manifest = fabric.points(model)
    if output.is_json:
        output.json(manifest)
        return
    click.secho(
        f"{manifest.model}: {manifest.num_layers} layers of {manifest.hidden}, {manifest.dtype},"
        f" {manifest.num_parameters:,} parameters ({manifest.family})",
        bold=True,
    )
    modules: dict[str, list[PointSpec]] = {}
    for spec in manifest.points:
        modules.setdefault(_module_of(spec), []).append(spec)
    for module, specs in modules.items():
        click.echo()
        output.table(
            [Column("POINT", whole=True), "SHAPE", "DTYPE", "MAY BE", "LANE", "WHY NOT"],
            [_row(spec, manifest.num_layers) for spec in specs],
            title=module,
        )
    if manifest.weights:
        count = len(manifest.weights)
        click.echo(f"\n{count} weights can be read and overlaid; --format json lists them.")


def _module_of(spec: PointSpec) -> str:
    """Return the module a point belongs to: ``layers.{i}.attn`` of ``layers.{i}.attn.out``."""
    return spec.pattern.rpartition(".")[0] or "the model's output"


def _row(spec: PointSpec, num_layers: int) -> tuple[object, ...]:
    may = [word for word, is_so in (("read", spec.read), ("written", spec.write)) if is_so]
    layers = ""
    if spec.layers and len(spec.layers) < num_layers:
        layers = f" (layers {', '.join(map(str, spec.layers))})"
    return (
        spec.pattern + layers,
        f"[{', '.join(map(str, spec.shape))}]",
        spec.dtype,
        ", ".join(may) or "neither",
        spec.lane,
        spec.reason,
    )
