"""``fabric runs``: what was asked, without the words."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from fabric.cli.money import su
from fabric.cli.options import client_options
from fabric.cli.output import Column, Output, seconds

if TYPE_CHECKING:
    from fabric.sdk import Fabric, Run


@click.command()
@click.argument("run_id", required=False)
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True)
@client_options
def runs(run_id: str | None, limit: int, fabric: Fabric, output: Output) -> None:
    """List your project's runs, newest first, or show one (RUN_ID)."""
    if run_id is not None:
        run = fabric.run(run_id)
        output.json(run) if output.is_json else output.facts(_facts(run))
        return
    latest = fabric.runs(limit=limit)
    if output.is_json:
        output.json(latest)
        return
    output.table(
        [
            *(Column("RUN", whole=True), "STARTED", "STATE", "SITE"),
            *(Column("TOKENS", numeric=True), Column("S", numeric=True)),
            Column("SU", numeric=True),
        ],
        [
            (
                run.id,
                run.created_at[5:16].replace("T", " "),
                run.state,
                run.site,
                run.usage.output_tokens,
                "" if run.total_s is None else f"{run.total_s:.2f}",
                su(run.charge_usu),
            )
            for run in latest
        ],
    )


def _facts(run: Run) -> list[tuple[str, object]]:
    return [
        ("run", run.id),
        ("state", f"{run.state} ({run.error_code})" if run.error_code else run.state),
        ("started", run.created_at),
        ("model", run.model),
        ("digest", run.digest or ""),
        ("site", run.site or ""),
        ("instance", run.instance or ""),
        ("attempts", run.attempts),
        ("because", run.reason or ""),
        ("tokens", f"{run.usage.prompt_tokens} in, {run.usage.output_tokens} out"),
        *([("adapter for", seconds(run.usage.adapter_s))] if run.adapter else []),
        *_program_facts(run),
        ("first token", seconds(run.first_token_s)),
        ("total", seconds(run.total_s)),
        ("charge", f"{su(run.charge_usu)} SU"),
    ]


def _program_facts(run: Run) -> list[tuple[str, object]]:
    if run.program is None:
        return []
    usage = run.usage
    return [
        ("program", run.program),
        ("bytes", f"{usage.hook_bytes_in} in, {usage.hook_bytes_out} out"),
        ("computed", seconds(usage.device_s)),
    ]
