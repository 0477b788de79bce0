"""``fabric-admin doctor``: what is wrong with a site or a hub, and what to do about it."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import IO, TYPE_CHECKING

import click

from fabric.cli.options import output_options
from fabric.cli.output import Output, note

if TYPE_CHECKING:
    from fabric.cli.doctor import Finding

WRONG = 1
"""The exit code when something is wrong."""

_WIDTH = 80
_STYLES = {"ok": "green", "warning": "yellow", "wrong": "red", "skipped": None}


@click.command()
@click.argument("site", metavar="[SITE]", required=False)
@click.option("--hub", "hub_url", metavar="URL", help="The hub's address (default: yours).")
@click.option("--database", "database_url", metavar="URL", help="The hub's database.")
@click.option("--token-file", type=click.File(), help="Holds the site's key.")
@click.option("--project", metavar="NAME", help="What jobs at the site are charged to.")
@click.option("--balance-token-file", type=click.File(), help="Holds the facility's token.")
@click.option("--weights", "in_full", is_flag=True, help="Read all weights: is every byte right?")
@output_options
@click.pass_context
def doctor(
    ctx: click.Context,
    site: str | None,
    hub_url: str | None,
    database_url: str | None,
    token_file: IO[str] | None,
    project: str | None,
    balance_token_file: IO[str] | None,
    in_full: bool,
    output: Output,
) -> None:
    """Look for what is wrong, and say what to do about it. Nothing is changed.

    SITE is a site's file, or the name of one; without it the hub alone is looked at. Run it where
    the site's agent runs, and on the login node: each machine sees what the other cannot. Ends with
    code 1 when something is wrong.

    \b
    Examples:
      fabric-admin doctor
      fabric-admin doctor anvil.yaml --token-file anvil.key
      fabric-admin doctor anvil.yaml --weights --format json
    """
    from fabric.cli.doctor import examine, get_checks
    from fabric.config import find_site, load_settings

    settings = load_settings({"client.base_url": hub_url, "hub.database_url": database_url})
    path = None if site is None else Path(site) if Path(site).exists() else find_site(site)
    checks = get_checks(
        settings,
        path,
        token=_read(token_file),
        project=project,
        balance_token=_read(balance_token_file),
        in_full=in_full,
    )
    findings = []
    for finding in examine(checks):
        findings.append(finding)
        if not output.is_json:
            _print(finding)
    num_wrong = sum(each.level == "wrong" for each in findings)
    if output.is_json:
        output.json({"findings": findings, "num_wrong": num_wrong})
    elif num_wrong == 0:
        note("Nothing is wrong.")
    else:
        note(f"{num_wrong} of {len(findings)} findings are wrong.")
    if num_wrong:
        ctx.exit(WRONG)


def _read(file: IO[str] | None) -> str | None:
    return None if file is None else file.read().strip()


def _print(finding: Finding) -> None:
    """Print a finding in at most 80 columns, what to do about it below."""
    level = click.style(finding.level.ljust(8), fg=_STYLES[finding.level])
    text = f"{finding.check}: {finding.detail}"
    click.echo(level + _fill(text))
    if finding.remedy:
        click.echo(" " * 8 + _fill(f"-> {finding.remedy}"))


def _fill(text: str) -> str:
    lines = textwrap.wrap(text, _WIDTH - 8, break_long_words=False, break_on_hyphens=False)
    return ("\n" + " " * 8).join(lines)
