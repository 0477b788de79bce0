"""``fabric plan``: what a model needs of devices, and how fast it could be."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from fabric.cli.options import output_options
from fabric.cli.output import Column, Output
from fabric.planning import DEFAULT_BATCH, DEFAULT_CONTEXT_TOKENS, DEVICES, HERE, PRECISIONS

if TYPE_CHECKING:
    from fabric.planning import Device, Plan, RankMemory

_COUNT = click.IntRange(1, 10**9)
_WIDTH = 80

_HERE_TITLE = f"{HERE} (this machine's processors, measured)"

_EPILOG = f"""\b
Devices: {textwrap.fill(", ".join([*DEVICES, _HERE_TITLE]), 69, subsequent_indent=" " * 9)}

\b
Examples:
  fabric plan                                       what is known
  fabric plan Llama-3-70B --device H100-80          does it fit on one node?
  fabric plan Kimi-K2 --device H200 --nodes 3       10^12 parameters
  fabric plan ./my-model --device A100-40 --dtype int8 --batch 4

Memory per rank is the sum of weights, the KV cache of all rows at their full
length, the activations of one step, and a tenth of the device for the
framework. GB are 10^9 bytes. Speeds are bounds: a real engine is slower.
"""


@click.command(epilog=_EPILOG)
@click.argument("model", required=False)
@click.option("--device", default="H200", show_default=True, help="What one rank runs on.")
@click.option("--nodes", type=_COUNT, default=1, show_default=True, help="Nodes there are.")
@click.option(
    "--devices-per-node", type=_COUNT, help="Devices in a node.  [default: the usual number]"
)
@click.option(
    "--dtype",
    type=click.Choice(list(PRECISIONS)),
    default="bf16",
    show_default=True,
    help="Of the weights; int8 and int4 leave the cache in 16 bits.",
)
@click.option(
    "--context",
    "context_tokens",
    type=_COUNT,
    help=f"Tokens of a row.  [default: {DEFAULT_CONTEXT_TOKENS}, or the model's]",
)
@click.option(
    "--batch", type=_COUNT, default=DEFAULT_BATCH, show_default=True, help="Rows at once."
)
@output_options
def plan(
    model: str | None,
    device: str,
    nodes: int,
    devices_per_node: int | None,
    dtype: str,
    context_tokens: int | None,
    batch: int,
    output: Output,
) -> None:
    """Show what MODEL needs of devices, how it is split, and how fast it could be.

    MODEL is a well-known name, or a folder with the config.json of a Hugging Face model. Nothing
    is loaded or downloaded. Without MODEL, list the models and devices that are known.
    """
    from fabric.planning import find_device, find_shape, get_plan

    if model is None:
        _list_known(output)
        return
    shape = find_shape(model)
    found = _measured() if device.lower() == HERE else find_device(device)
    made = get_plan(
        shape,
        found,
        num_nodes=nodes,
        devices_per_node=devices_per_node,
        dtype=dtype,
        context_tokens=context_tokens,
        batch=batch,
    )
    if output.is_json:
        output.json(_record(made))
    else:
        _print(made, output)


def _measured() -> Device:
    from fabric.planning.here import measure_here

    return measure_here()


def _list_known(output: Output) -> None:
    from fabric.planning import KNOWN_MODELS, known_shape

    shapes = [known_shape(name) for name in KNOWN_MODELS]
    if output.is_json:
        models = {s.name: {"parameters": s.parameters, "family": s.family} for s in shapes}
        output.json({"models": models, "devices": {n: asdict(d) for n, d in DEVICES.items()}})
        return
    output.table(
        ["MODEL", *(Column(c, numeric=True) for c in ("PARAMETERS", "ACTIVE", "CONTEXT"))],
        [
            (s.name, f"{s.parameters:,}", f"{s.active_parameters:,}", s.context_tokens)
            for s in shapes
        ],
    )
    click.echo()
    output.table(
        ["DEVICE", *(Column(c, numeric=True) for c in ("GB", "GB/S", "TFLOP/S", "A NODE")), "IS"],
        [
            (
                d.name,
                f"{d.memory_bytes / 1e9:.0f}",
                f"{d.memory_bytes_s / 1e9:.0f}",
                f"{d.flops['bf16'] / 1e12:g}",
                d.devices_per_node,
                d.title,
            )
            for d in DEVICES.values()
        ],
    )


def _print(plan: Plan, output: Output) -> None:
    shape, machine, work, split = plan.shape, plan.machine, plan.work, plan.split
    active = ""
    if shape.num_experts:
        active = f", {shape.active_parameters:,} for a token"
    click.secho(f"{shape.name}: {shape.parameters:,} parameters{active}", bold=True)
    click.echo(
        f"{work.dtype}, {work.batch} rows of {work.context_tokens} tokens, on"
        f" {machine.num_nodes} x {machine.devices_per_node} {machine.device.name}"
        f" ({_gb(machine.device.memory_bytes)} GB each)"
    )
    copies = "1 copy" if plan.num_copies == 1 else f"{plan.num_copies} copies"
    click.echo(f"{copies} of {split.tensor} tensor x {split.pipeline} pipeline ranks")
    if split.num_ranks > 1:
        said = f"options: {_flow(plan.engine_options)}"
        click.echo(textwrap.fill(said, _WIDTH, subsequent_indent="  "))
    click.echo()
    sizes = ("WEIGHTS", "CACHE", "ACTIVATIONS", "RESERVE", "TOTAL GB", "FREE")
    output.table(
        ["RANKS", "NODE", "LAYERS", *(Column(size, numeric=True) for size in sizes)],
        [_row(plan, stage) for stage in range(split.pipeline)],
    )
    click.echo()
    output.facts(list(_speeds(plan)))
    click.echo()
    for text in (*plan.reasons, *(f"Note: {warning}" for warning in plan.warnings)):
        click.echo(textwrap.fill(text, _WIDTH, initial_indent="- ", subsequent_indent="  "))


def _flow(options: Mapping[str, object]) -> str:
    """Return options as a site's file has them."""
    return "{" + ", ".join(f"{name}: {value}" for name, value in options.items()) + "}"


def _row(plan: Plan, stage: int) -> tuple[object, ...]:
    """Return a stage's line: its ranks hold the same to a few rows of the vocabulary."""
    tensor = plan.split.tensor
    first = stage * tensor
    rank = max(plan.ranks[first : first + tensor], key=lambda rank: rank.total_bytes)
    return (
        _range(first, first + tensor - 1),
        plan.node_of(rank),
        _range(rank.first_layer, rank.first_layer + rank.num_layers - 1),
        *(_gb(size) for size in _sizes(rank).values()),
        _gb(plan.machine.device.memory_bytes - rank.total_bytes),
    )


def _speeds(plan: Plan) -> Iterator[tuple[str, str]]:
    bounds, work = plan.bounds, plan.work
    a_copy = " a copy" if plan.num_copies > 1 else ""
    yield (
        "decode, at most",
        f"{bounds.decode_tokens_s:,.0f} tokens/s{a_copy}, {bounds.decode_tokens_s_row:.1f} a row"
        f" (limit: {bounds.decode_limit})",
    )
    yield (
        "prefill, at most",
        f"{bounds.prefill_tokens_s:,.0f} tokens/s{a_copy} (limit: {bounds.prefill_limit})",
    )
    yield (
        "first token, at least",
        f"{bounds.first_token_s:.3g} s after a prompt of {work.context_tokens} tokens",
    )
    if plan.split.pipeline > 1:
        yield (
            "pipeline bubbles",
            f"{bounds.decode_idle:.0%} of decoding, {bounds.prefill_idle:.0%} of a lone prefill",
        )
    yield "rows that fit", f"{plan.max_batch} of {work.context_tokens} tokens{a_copy}"


def _range(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.{1 if num_bytes >= 10**9 else 3}f}"


def _sizes(rank: RankMemory) -> dict[str, int]:
    return {
        "weight_bytes": rank.weight_bytes,
        "cache_bytes": rank.cache_bytes,
        "activation_bytes": rank.activation_bytes,
        "reserve_bytes": rank.reserve_bytes,
        "total_bytes": rank.total_bytes,
    }


def _record(plan: Plan) -> dict[str, object]:
    shape, machine, split = plan.shape, plan.machine, plan.split
    return {
        "model": shape.name,
        "family": shape.family,
        "parameters": shape.parameters,
        "active_parameters": shape.active_parameters,
        "device": machine.device.name,
        "device_bytes": machine.device.memory_bytes,
        "num_nodes": machine.num_nodes,
        "devices_per_node": machine.devices_per_node,
        **asdict(plan.work),
        "split": {
            "tensor": split.tensor,
            "pipeline": split.pipeline,
            "experts": split.experts,
            "num_copies": plan.num_copies,
            "num_nodes": plan.num_nodes,
        },
        "engine_options": plan.engine_options,
        "ranks": [
            {"rank": index, "node": plan.node_of(rank), **asdict(rank), **_sizes(rank)}
            for index, rank in enumerate(plan.ranks)
        ],
        "bounds": asdict(plan.bounds),
        "max_batch": plan.max_batch,
        "reasons": plan.reasons,
        "warnings": plan.warnings,
    }
