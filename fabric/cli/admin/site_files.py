"""``fabric-admin site validate`` and ``list-shipped``: the files of sites, without a database."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fabric.cli.options import output_options
from fabric.cli.output import Column, Output

if TYPE_CHECKING:
    from fabric.config import Problem, SiteSpec

_VALUE_CHARS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class FileReport:
    """A file, and what is wrong in it."""

    site: str
    path: str
    rendered: bool
    problems: tuple[Problem, ...]


@click.command()
@click.argument("files", metavar="[FILE|NAME]...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Every site that is found by name.")
@output_options
def validate(files: tuple[str, ...], everything: bool, output: Output) -> None:
    """Check site files: the schema, the machine's limits, and the endpoint that comes of them.

    Everything that is wrong is listed with its field and value; then the exit code is 3. To try an
    endpoint with Globus Compute's own programs, use `fabric-admin endpoint check`.

    \b
    Example:
      fabric-admin site validate anvil.yaml
    """
    if everything == bool(files):
        raise click.UsageError("Give either FILEs and NAMEs or --all.")
    from fabric.config import find_site, get_site_files
    from fabric.errors import SiteInvalid

    if everything:
        named = [(each.name, each.path) for each in get_site_files().values()]
    else:
        named = [
            (path.stem, path) if (path := Path(file)).exists() else (file, find_site(file))
            for file in files
        ]
    reports = [inspect_file(name, path) for name, path in named]
    if output.is_json:
        output.json(reports)
    else:
        output.table(
            [Column("SITE", whole=True), "", "FIELD", "VALUE", "REMARK"],
            [row for report in reports for row in _rows(report)],
        )
    if bad := [report.site for report in reports if report.problems]:
        raise SiteInvalid(sites=bad, num_checked=len(reports))


@click.command("list-shipped")
@output_options
def list_shipped(output: Output) -> None:
    """List the sites that are found by name, those that ship and your own.

    \b
    Example:
      fabric-admin site list-shipped --format json
    """
    from fabric.config import get_site_files, inspect_site

    found = [(file, inspect_site(file.path)[0]) for file in get_site_files().values()]
    if output.is_json:
        output.json(
            [
                {"name": file.name, "path": str(file.path), "is_own": file.is_own, "site": spec}
                for file, spec in found
            ]
        )
        return
    output.table(
        [Column("SITE", whole=True), "FROM", "SCHEDULER", "DEVICES", "CHECKED", "TITLE"],
        [
            (file.name, "yours" if file.is_own else "shipped", *_describe(spec))
            for file, spec in found
        ],
    )


def inspect_file(name: str, path: Path) -> FileReport:
    """Return everything that is wrong in a site's file, or in the endpoint that comes of it."""
    from fabric.config import inspect_site

    spec, problems = inspect_site(path)
    rendered = False
    if spec is not None:
        problems = tuple(_check(name, spec))
        rendered = spec.endpoint is not None and not problems
    return FileReport(site=name, path=str(path), rendered=rendered, problems=problems)


def _check(name: str, spec: SiteSpec) -> Iterator[Problem]:
    """Return what is wrong though the schema is followed."""
    import yaml

    from fabric.compute.endpoint import get_endpoint_files
    from fabric.config import Problem

    if spec.name != name:
        reason = f"the file is called {name}; give both the same name"
        yield Problem(field="name", value=spec.name, reason=reason)
    if spec.endpoint is None:
        return
    # The template is whole only with a caller's options; `fabric-admin endpoint check` has those.
    for each, text in get_endpoint_files(spec, Path(name)).items():
        try:
            if each.endswith(".json"):
                json.loads(text)
            elif each.endswith(".yaml"):
                yaml.safe_load(text)
        except (ValueError, yaml.YAMLError) as error:
            yield Problem(field="endpoint", value=each, reason=f"it is rendered wrongly: {error}")


def _rows(report: FileReport) -> Iterator[tuple[str, ...]]:
    for each in report.problems:
        value = str(each.value)
        shown = value if len(value) <= _VALUE_CHARS else value[: _VALUE_CHARS - 1] + "…"
        yield report.site, "failed", each.field, " ".join(shown.split()), each.reason
    if not report.problems:
        yield report.site, "ok", "", "", "endpoint rendered" if report.rendered else ""


def _describe(spec: SiteSpec | None) -> tuple[str, ...]:
    if spec is None:
        return "", "", "", "cannot be used; see `fabric-admin site validate`"
    system = spec.system
    if system is None:
        return "", "", "", spec.title
    devices = dict.fromkeys(kind.device for kind in system.nodes.values() if kind.device)
    return system.scheduler, ", ".join(devices), system.checked, spec.title
