"""``fabric top``: what runs, what waits, what is kept of the promises and what is spent."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import click

from fabric.cli.money import su
from fabric.cli.options import client_options
from fabric.cli.output import Column, Output, get_rich_table, short

if TYPE_CHECKING:
    from rich.console import Group

    from fabric.sdk import Fabric, Site, Spend, Statement
    from fabric.sdk.tiers import Attained, Queue

_WINDOW = "1h"
_MEASURES = {"first_token": "first token", "token": "per token", "answered": "answered"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """What the hub said at one moment."""

    sites: tuple[Site, ...]
    queue: tuple[Queue, ...]
    slo: tuple[Attained, ...]
    spend: tuple[Spend, ...]
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
    hour_ago = datetime.now(UTC) - timedelta(hours=1)
    return _Seen(
        sites=fabric.sites(),
        queue=fabric.queue(),
        slo=fabric.slo(),
        spend=fabric.spend(since=hour_ago.isoformat()),
        usage=fabric.usage(limit=1),
    )


def _watch(fabric: Fabric, interval_s: float) -> None:
    """Show it again and again; a hub that is away for a while is waited for."""
    from rich.live import Live
    from rich.text import Text

    from fabric.errors import HubUnreachable

    seen = _look(fabric)
    with Live(screen=True, auto_refresh=False) as live:
        while True:
            live.update(_picture(seen, live.console.height), refresh=True)
            time.sleep(interval_s)
            try:
                seen = _look(fabric)
            except HubUnreachable as away:
                live.update(Text(away.message, style="red"), refresh=True)
                time.sleep(interval_s)


def _picture(seen: _Seen, num_lines: int) -> Group:
    """Return what fits a terminal of so many lines: there the sites get what others leave."""
    from rich.console import Group, RenderableType
    from rich.text import Text

    _, *others = _sections(seen)
    room = num_lines - sum(len(section.rows) + 3 for section in others)
    parts: list[RenderableType] = []
    for section in _sections(seen, room - 2):
        parts.append(Text(section.title, style="bold"))
        if section.rows:
            table = get_rich_table(section.columns, section.rows)
            table.box = None
            parts += [table, ""]
        else:
            parts += [Text(section.empty, style="dim"), ""]
    return Group(*parts)


def _sections(seen: _Seen, most_replicas: int | None = None) -> Iterator[_Section]:
    numbers = ("BUSY", "ROWS", "WAITING", "CACHE")
    rows = [row for site in seen.sites for row in _replicas(site)]
    if most_replicas is not None and len(rows) > most_replicas:
        rows = [row for site in seen.sites for row in _summed(site)]
    yield _Section(
        "Sites",
        ["SITE", "STATE", "MODEL", "INSTANCE", *(Column(n, numeric=True) for n in numbers)],
        rows,
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
        f"Spent by {seen.usage.project} in the last hour",
        ["MODEL", "SITE", *(Column(n, numeric=True) for n in ("RUNS", "TOKENS", "SU"))],
        [
            (
                *(one.model, one.site, one.num_runs),
                *(one.prompt_tokens + one.output_tokens, su(one.charge_usu)),
            )
            for one in seen.spend
        ],
        "Nothing was run in the last hour.",
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


def _summed(site: Site) -> list[tuple[object, ...]]:
    """Return a line for each model at a site, or one without."""
    rows: list[tuple[object, ...]] = []
    for model in sorted({one.model for one in site.replicas}):
        some = [one for one in site.replicas if one.model == model]
        num_ready = sum(one.state == "ready" for one in some)
        rows.append(
            (
                *(site.name, site.state, model, f"{num_ready} of {len(some)} ready"),
                *(sum(one.num_running for one in some), sum(one.max_rows for one in some)),
                sum(one.num_waiting for one in some),
                f"{sum(one.cache_usage for one in some) / len(some):.0%}",
            )
        )
    return rows or _replicas(site)


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
