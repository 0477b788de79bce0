"""``fabric-admin endpoint``: needs no database, but to show which endpoints the hub knows."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import click

from fabric.cli.admin.database import Books, database_options
from fabric.cli.options import Command, output_options
from fabric.cli.output import Column, Output, note

if TYPE_CHECKING:
    from fabric.config import SiteSpec


@click.group()
def endpoint() -> None:
    """The Globus Compute endpoint of a site.

    \b
    A site's file says under `endpoint` how blocks are started: scheduler, queue,
    account, walltime. From it come the files an endpoint needs:
      fabric-admin endpoint check FILE      would it work, what may callers do?
      fabric-admin endpoint install FILE    write it under ~/.globus_compute
      globus-compute-endpoint start NAME    start it; it tells its id
    FILE is a site's file, or a name that `fabric-admin site list-shipped` lists.

    \b
    Example:
      fabric-admin endpoint install anvil.yaml --dry-run
    """


@endpoint.command()
@database_options
def show(books: Books, output: Output) -> None:
    """List the endpoints of the sites that the hub knows.

    \b
    Example:
      fabric-admin endpoint show --format json
    """
    found = [
        {"site": site.name, "channel": one["channel"], "endpoint_id": one["endpoint_id"]}
        for site in books.catalog.sites()
        for one in [site.facts.get("executor")]
        if isinstance(one, dict) and one["kind"] == "globus-compute"
    ]
    if output.is_json:
        output.json(found)
        return
    output.table(
        ["SITE", Column("ENDPOINT", whole=True), "CHANNEL"],
        [(one["site"], one["endpoint_id"], one["channel"]) for one in found],
        empty="No site has one; `executor` in a site's file names it, and"
        " `fabric-admin site modify SITE --file FILE` tells the hub.",
    )


def _site_options(function: Command) -> Command:
    """Add FILE, ``--function`` and output options; the function gets ``site`` and ``functions``."""

    @click.argument("file")
    @click.option(
        "--function",
        "functions",
        type=click.UUID,
        multiple=True,
        help="A registered function that may run besides those of FILE; repeatable.",
    )
    @output_options
    @functools.wraps(function)
    def wrapper(*args: Any, file: str, **kwargs: Any) -> Any:
        return function(*args, site=_load(file), **kwargs)

    return wrapper  # type: ignore[return-value]


def _load(file: str) -> SiteSpec:
    from fabric.config import find_site, load_site

    path = Path(file)
    return load_site(path if path.exists() else find_site(file))


@endpoint.command()
@_site_options
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Write them here.")
@click.option("--dry-run", is_flag=True, help="Print them, though --out is given.")
def render(
    site: SiteSpec, functions: tuple[UUID, ...], out: Path | None, dry_run: bool, output: Output
) -> None:
    """Print an endpoint's files, or write them to --out.

    \b
    Example:
      fabric-admin endpoint render anvil.yaml
    """
    from fabric.compute.endpoint import get_endpoint_files
    from fabric.compute.endpoint_install import get_endpoint_directory, install

    directory = (out or get_endpoint_directory(site.name)).absolute()
    files = get_endpoint_files(site, directory, functions)
    if out is not None and not dry_run:
        install(directory, files)
    if output.is_json:
        output.json({"directory": str(directory), "files": files})
    elif out is not None and not dry_run:
        note(f"Wrote {', '.join(files)} to {directory}.")
    else:
        for name, text in files.items():
            click.secho(f"# {directory / name}", bold=True)
            click.echo(text)


@endpoint.command()
@_site_options
def check(site: SiteSpec, functions: tuple[UUID, ...], output: Output) -> None:
    """Try an endpoint's files with Globus Compute's own programs; takes some seconds.

    Run it where the endpoint will run. Loads the configuration, renders the template for every
    value callers may choose, and sees that it refuses everything else. Exits with 3 when something
    would not work.

    \b
    Example:
      fabric-admin endpoint check anvil.yaml
    """
    from fabric.compute.endpoint_check import check_endpoint
    from fabric.errors import EndpointInvalid

    findings = []
    for finding in check_endpoint(site, functions):
        findings.append(finding)
        if output.is_terminal and not output.is_json:
            note(f"{finding.check} …")
    if output.is_json:
        output.json(findings)
    else:
        output.table(
            [Column("CHECK", whole=True), "", "DETAIL"],
            [(each.check, "ok" if each.ok else "failed", each.detail) for each in findings],
        )
    if failed := {each.check: each.detail for each in findings if not each.ok}:
        raise EndpointInvalid(site=site.name, findings=failed)


@endpoint.command()
@_site_options
@click.option("--name", metavar="NAME", help="The endpoint's name; the site's by default.")
@click.option("--dry-run", is_flag=True, help="Show the difference and write nothing.")
@click.option("--force", is_flag=True, help="Replace files that somebody else wrote or changed.")
def install(
    site: SiteSpec,
    functions: tuple[UUID, ...],
    name: str | None,
    dry_run: bool,
    force: bool,
    output: Output,
) -> None:
    """Write an endpoint's files to ~/.globus_compute/NAME (or under GLOBUS_COMPUTE_USER_DIR).

    What is replaced stays beside it as *.bak. Files that were edited by hand are left alone unless
    --force is given. An endpoint that runs reads its files when it is restarted.

    \b
    Example:
      fabric-admin endpoint install anvil.yaml --dry-run
    """
    from fabric.compute import endpoint_install
    from fabric.compute.endpoint import get_endpoint_files

    directory = endpoint_install.get_endpoint_directory(name or site.name)
    files = get_endpoint_files(site, directory, functions)
    endpoint_id = endpoint_install.read_endpoint_id(directory, site)
    if dry_run:
        changes = endpoint_install.plan_install(directory, files)
    else:
        changes = endpoint_install.install(directory, files, force=force)
        _install_store(site)
    if output.is_json:
        changed = [{"name": each.name, "foreign": each.foreign} for each in changes]
        facts = {"directory": str(directory), "endpoint_id": endpoint_id, "changed": changed}
        output.json({**facts, "written": not dry_run})
    elif dry_run:
        click.echo("".join(each.diff() for each in changes), nl=False)
        note(f"{len(changes)} of {len(files)} files in {directory} would change.")
    else:
        note(f"Wrote {len(changes)} of {len(files)} files in {directory}; the others are the same.")
        start = f"globus-compute-endpoint start {directory.name}"
        note(f"Its id is {endpoint_id}." if endpoint_id else f"Start it with `{start}`.")


def _install_store(site: SiteSpec) -> None:
    """Tell the functions that run on site where results too large for the service are kept."""
    from fabric.config import ComputeExecutor, save_store

    if site.store is not None:
        executor = site.executor
        run_dir = executor.run_dir if isinstance(executor, ComputeExecutor) else "~/.fabric"
        save_store(site.store, Path(run_dir).expanduser())
        note(f"Results over 5 MB are kept in the {site.store.kind} store {site.store.name!r}.")
