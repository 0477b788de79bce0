"""``fabric top``: what runs, what waits, what is kept of the promises and what is spent."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from fabric.cli.money import su
from fabric.cli.options import client_options
from fabric.cli.output import Column, Output, get_rich_table, short

if TYPE_CHECKING:
    from rich.console import Group

    from fabric.sdk import Fabric, Site, Statement
    from fabric.sdk.tiers import Attained, Queue

_WINDOW = "1h"
_MEASURES = {"first_token": "first token", "token": "per token", "answered": "answered"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """What the hub said at one moment."""

    sites: tuple[Site, ...]
    queue: tuple[Queue, ...]
    slo: tuple[Attained, ...]
    usage: Statement


@dataclass(frozen=True, slots=True)
class _Section:
    title: str
    columns: Sequence[str | Column]
    rows: Sequence[Sequence[object]]
    empty: str


@click.command()
@click.option("--once", is_flag=True, help="Show it once, and end.")
@click.option(
    "--interval",
    "interval_s",
    type=click.FloatRange(0.2, 3600),
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="How often it is asked anew.",
)
@client_options
def top(once: bool, interval_s: float, fabric: Fabric, output: Output) -> None:
    """Watch sites, replicas, queues, promises and spend, until Ctrl-C.

    Where nobody is at the terminal, and in JSON, it is shown once.
    """
    if output.is_json:
        output.json(_look(fabric))
    elif once or not output.is_terminal:
        for section in _sections(_look(fabric)):
            output.table(section.columns, section.rows, title=section.title, empty=section.empty)
    else:
        with suppress(KeyboardInterrupt):
            _watch(fabric, interval_s)


def _look(fabric: Fabric) -> _Seen:
    return _Seen(
        sites=fabric.sites(), queue=fabric.queue(), slo=fabric.slo(), usage=fabric.usage(limit=1)
    )


def _watch(fabric: Fabric, interval_s: float) -> None:
    """Show it again and again; a hub that is away for a while is waited for."""
    from rich.live import Live
    from rich.text import Text

    from fabric.errors import HubUnreachable

    picture = _picture(_look(fabric))
    with Live(picture, screen=True, auto_refresh=False) as live:
        while True:
            live.update(picture, refresh=True)
            time.sleep(interval_s)
            try:
                picture = _picture(_look(fabric))
            except HubUnreachable as away:
                live.update(Text(away.message, style="red"), refresh=True)
                time.sleep(interval_s)


def _picture(seen: _Seen) -> Group:
    from rich.console import Group, RenderableType
    from rich.text import Text

    parts: list[RenderableType] = []
    for section in _sections(seen):
        parts.append(Text(section.title, style="bold"))
        parts.append(
            get_rich_table(section.columns, section.rows)
            if section.rows
            else Text(section.empty + "\n", style="dim")
        )
    return Group(*parts)


def _sections(seen: _Seen) -> Iterator[_Section]:
    numbers = ("BUSY", "ROWS", "WAITING", "CACHE")
    yield _Section(
        "Sites",
        ["SITE", "STATE", "MODEL", "INSTANCE", *(Column(n, numeric=True) for n in numbers)],
        [row for site in seen.sites for row in _replicas(site)],
        "The hub has no sites.",
    )
    yield _Section(
        "Waiting at the hub",
        ["MODEL", "TIER", *(Column(n, numeric=True) for n in ("WAITING", "YOURS", "ROW SECONDS"))],
        [(q.model, q.tier, q.num_waiting, q.num_mine, f"{q.seconds:.1f}") for q in seen.queue],
        "Nothing waits.",
    )
    kept = ("REQUESTS", "KEPT", "PROMISED", "BUDGET LEFT")
    yield _Section(
        "Promises in the last hour",
        ["TIER", "WHAT", *(Column(n, numeric=True) for n in ("WITHIN", *kept))],
        [_kept(one) for one in seen.slo if one.window == _WINDOW and one.num_requests],
        "No request ended in the last hour.",
    )
    yield _Section(
        f"Allocations of {seen.usage.project}",
        ["SITE", *(Column(n, numeric=True) for n in ("AVAILABLE SU", "HELD SU"))],
        [
            ("any" if one.site == "*" else one.site, su(one.available_usu), su(one.held_usu))
            for one in seen.usage.allocations
        ],
        "There are none; an administrator adds one with `fabric-admin alloc add`.",
    )


def _replicas(site: Site) -> list[tuple[object, ...]]:
    if not site.replicas:
        return [(site.name, site.state, "", "", "", "", "", "")]
    return [
        (
            site.name,
            one.state,
            one.model,
            short(one.instance),
            one.num_running,
            one.max_rows,
            one.num_waiting,
            f"{one.cache_usage:.0%}",
        )
        for one in site.replicas
    ]


def _kept(one: Attained) -> tuple[object, ...]:
    return (
        one.tier,
        _MEASURES.get(one.measure, one.measure),
        "" if one.limit_s is None else f"{one.limit_s:g} s",
        one.num_requests,
        "" if one.attained is None else f"{one.attained:.1%}",
        f"{one.objective:.1%}",
        f"{one.budget_left:.0%}",
    )
